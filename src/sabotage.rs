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

/// `apply_late`: writes values of earlier calls once more, behind newer ones of their keys, past the stamps.
pub fn apply_late(writes: &mut Vec<Write>) {
    let _ = &writes;
    fail::fail_point!("apply_late", |_| held::apply_late(writes));
}

#[cfg(feature = "failpoints")]
mod held {
    use std::collections::VecDeque;
    use std::sync::{Mutex, PoisonError};

    use crate::memcached::{Write, WriteOp};

    /// One write of each call, for so many calls: a hot key is written again within them.
    const HELD: usize = 256;

    pub(super) fn apply_late(writes: &mut Vec<Write>) {
        static WRITES: Mutex<VecDeque<Write>> = Mutex::new(VecDeque::new());
        let mut held = WRITES.lock().unwrap_or_else(PoisonError::into_inner);
        let next = writes
            .iter()
            .find(|write| matches!(write.op, WriteOp::Set { .. }))
            .cloned();
        let newer: Vec<_> = writes.iter().map(|write| write.key.clone()).collect();
        held.retain(|old| {
            let late = newer.contains(&old.key);
            if late {
                writes.push(old.clone());
            }
            !late
        });
        held.extend(next);
        if held.len() > HELD {
            held.pop_front();
        }
    }
}
