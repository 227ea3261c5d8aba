//! What evrepl must never do, on demand (`FAILPOINTS=drop_acked_item=return`): the fault lab's tests show that the lab
//! notices. Without the feature `failpoints` none of it is compiled.

use crate::memcached::Writes;

/// `drop_acked_item`: whether the agent acks this item without writing it.
pub fn drop_acked_item() -> bool {
    fail::fail_point!("drop_acked_item", |_| true);
    false
}

/// `commit_early`: the offset behind which a partition's watermark is committed; one too far while events are `open`.
pub fn commit_early(watermark: i64, open: u64) -> i64 {
    let _ = open;
    fail::fail_point!("commit_early", open > 0, |_| watermark + 1);
    watermark
}

/// `apply_late`: writes values of earlier calls once more, some time after newer ones of their keys, past the stamps.
pub fn apply_late(writes: &mut Writes) {
    let _ = &writes;
    fail::fail_point!("apply_late", |_| held::apply_late(writes));
}

#[cfg(feature = "failpoints")]
mod held {
    use std::collections::VecDeque;
    use std::sync::{Mutex, PoisonError};
    use std::time::Duration;

    use tokio::time::Instant;

    use crate::memcached::{Write, WriteOp, Writes};

    /// One write of each call, for so many calls: a hot key is written again within them.
    const HELD: usize = 256;
    /// How long the newer value stands: long enough to be seen.
    const LATE_BY: Duration = Duration::from_millis(50);

    /// One set of the past.
    struct Held {
        key: Vec<u8>,
        value: Vec<u8>,
        flags: u32,
        expiry: u32,
        /// When it is due, once a newer write of its key has gone by.
        due: Option<Instant>,
    }

    static HELD_WRITES: Mutex<VecDeque<Held>> = Mutex::new(VecDeque::new());

    pub(super) fn apply_late(writes: &mut Writes) {
        let mut all_held = HELD_WRITES.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        for held in all_held.iter_mut().filter(|held| held.due.is_none()) {
            held.due = writes.iter().any(|new| new.key == held.key).then_some(now + LATE_BY);
        }
        all_held.extend(writes.iter().find_map(|write| match write.op {
            WriteOp::Set { value, flags, expiry } => Some(Held {
                key: write.key.to_vec(),
                value: value.to_vec(),
                flags,
                expiry,
                due: None,
            }),
            _ => None,
        }));
        all_held.retain(|held| {
            let late = held.due.is_some_and(|due| due <= now);
            if late {
                let op = WriteOp::Set {
                    value: &held.value,
                    flags: held.flags,
                    expiry: held.expiry,
                };
                writes.push(Write { key: &held.key, op });
            }
            !late
        });
        if all_held.len() > HELD {
            all_held.pop_front();
        }
    }
}
