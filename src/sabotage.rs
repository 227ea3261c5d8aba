//! What evrepl must never do, on demand (`FAILPOINTS=drop_acked_item=return`): the fault lab's tests show that the lab
//! notices. Without the feature `failpoints` none of it is compiled.

use crate::memcached::Write;

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
pub fn apply_late(writes: &mut Vec<Write>) {
    let _ = &writes;
    fail::fail_point!("apply_late", |_| held::apply_late(writes));
}

#[cfg(feature = "failpoints")]
mod held {
    use std::collections::VecDeque;
    use std::sync::{Mutex, PoisonError};
    use std::time::Duration;

    use tokio::time::Instant;

    use crate::memcached::{Write, WriteOp};

    /// One write of each call, for so many calls: a hot key is written again within them.
    const HELD: usize = 256;
    /// How long the newer value stands: long enough to be seen.
    const LATE_BY: Duration = Duration::from_millis(50);

    /// Writes of the past, and when one is due, once a newer one of its key has gone by.
    static WRITES: Mutex<VecDeque<(Write, Option<Instant>)>> = Mutex::new(VecDeque::new());

    pub(super) fn apply_late(writes: &mut Vec<Write>) {
        let mut held = WRITES.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        for (old, due) in held.iter_mut().filter(|(_, due)| due.is_none()) {
            *due = writes.iter().any(|new| new.key == old.key).then_some(now + LATE_BY);
        }
        held.extend(
            writes
                .iter()
                .find(|write| matches!(write.op, WriteOp::Set { .. }))
                .map(|write| (write.clone(), None)),
        );
        held.retain(|(old, due)| {
            let late = due.is_some_and(|due| due <= now);
            if late {
                writes.push(old.clone());
            }
            !late
        });
        if held.len() > HELD {
            held.pop_front();
        }
    }
}
