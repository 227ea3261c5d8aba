//! How an event ended: every consumed event gets exactly one outcome, and the sums are checked.

use serde::{Deserialize, Serialize};

/// The end of one consumed event. The names are public: they label metrics, `/status` and the tests' accounts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[repr(u8)]
pub enum Outcome {
    /// Stored or touched at the destination.
    Applied,
    /// The source has no value and the event was a delete, or the policy is to invalidate: the peer's copy is removed.
    Deleted,
    /// A set or a touch, but the source has no value: removed at the peer.
    Missing,
    /// A newer event for the key was in the same chunk, batch or dirty key.
    Superseded,
    /// Expired on the way: removed at the peer.
    Expired,
    /// Larger than the policy or the destination allows: removed at the peer.
    TooLarge,
    /// Not for this peer: by rule, or because it came from there.
    Filtered,
    /// The destination held something newer (for the version milestone).
    Stale,
    /// Handed to the retry topic; consumed again when it comes back.
    Parked,
    /// Undecodable or refused for good: handed to the dead-letter topic.
    DeadLettered,
    /// Given back uncommitted; whoever reads it next consumes it again.
    Released,
}

impl Outcome {
    /// How many outcomes there are; [`Outcome::index`] is below it.
    pub const COUNT: usize = 11;

    /// Every outcome, in the order of the pipeline's documentation.
    pub const ALL: [Outcome; Outcome::COUNT] = [
        Outcome::Applied,
        Outcome::Deleted,
        Outcome::Missing,
        Outcome::Superseded,
        Outcome::Expired,
        Outcome::TooLarge,
        Outcome::Filtered,
        Outcome::Stale,
        Outcome::Parked,
        Outcome::DeadLettered,
        Outcome::Released,
    ];

    /// Position in [`Outcome::ALL`], for arrays of counters.
    pub fn index(self) -> usize {
        self as usize
    }

    /// The public name, as metrics and `/status` show it.
    pub fn name(self) -> &'static str {
        match self {
            Outcome::Applied => "applied",
            Outcome::Deleted => "deleted",
            Outcome::Missing => "missing",
            Outcome::Superseded => "superseded",
            Outcome::Expired => "expired",
            Outcome::TooLarge => "too_large",
            Outcome::Filtered => "filtered",
            Outcome::Stale => "stale",
            Outcome::Parked => "parked",
            Outcome::DeadLettered => "dead_lettered",
            Outcome::Released => "released",
        }
    }
}
