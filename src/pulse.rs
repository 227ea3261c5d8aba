//! Pulses: whether a stage moves. Each actor keeps one, its supervisor looks at all of them and finds the stage that has
//! work, waits for nothing that it may wait for, and does not move; or that has been inside one handler for too long,
//! which is a thread that hangs.
//!
//! Written once per message or timer, never per event. Plain types; the instant is passed in.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use actix_rt::ArbiterHandle;
use tokio::time::Instant;

/// A look that comes so late was kept from looking itself: by a frozen process or a machine without CPU, in which nothing
/// else could move either.
const LATE: Duration = Duration::from_secs(1);

/// How often a thread shows that it turns.
const BEAT: Duration = Duration::from_millis(250);
/// How often an actor says how much work it has.
pub const PULSE_EVERY: Duration = Duration::from_millis(250);

#[derive(Debug, Default)]
struct State {
    inside: Option<&'static str>,
    entered: u64,
    moved: u64,
    last: Option<&'static str>,
    work: u64,
    waits_for: Option<&'static str>,
}

/// One stage's pulse.
#[derive(Debug)]
pub struct Pulse {
    actor: &'static str,
    place: String,
    /// What it may take at least, whatever the limit.
    patience: Duration,
    state: Mutex<State>,
}

impl Pulse {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The stage is inside `what` until the guard drops.
    pub fn enter(self: &Arc<Self>, what: &'static str) -> Inside {
        let mut state = self.lock();
        let outer = state.inside.replace(what);
        state.entered += 1;
        drop(state);
        Inside {
            pulse: self.clone(),
            outer,
        }
    }

    /// Something got further.
    pub fn moved(&self, what: &'static str) {
        let mut state = self.lock();
        state.moved += 1;
        state.last = Some(what);
    }

    /// How much work there is, and what it waits for if that is no fault of the stage: it ends by itself, is somebody else's
    /// work, or lasts as long as a peer or a server is away.
    pub fn holds(&self, work: u64, waits_for: Option<&'static str>) {
        let mut state = self.lock();
        (state.work, state.waits_for) = (work, waits_for);
    }
}

/// Shows without end that the thread it runs on turns.
async fn beat(pulse: Arc<Pulse>) {
    loop {
        pulse.moved("turned");
        tokio::time::sleep(BEAT).await;
    }
}

/// See [`Pulse::enter`].
#[derive(Debug)]
pub struct Inside {
    pulse: Arc<Pulse>,
    /// What it was inside of already.
    outer: Option<&'static str>,
}

impl Drop for Inside {
    fn drop(&mut self) {
        let mut state = self.pulse.lock();
        state.last = state.inside.take();
        state.inside = self.outer;
    }
}

/// A stage that does not move.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stall {
    /// Which kind of actor.
    pub actor: &'static str,
    /// Which one: its lane, server or partition.
    pub place: String,
    /// The handler that it does not come back from; `None` when its thread is free.
    pub inside: Option<&'static str>,
    /// What it did last.
    pub last: Option<&'static str>,
    /// How much work it has: messages, batches or keys.
    pub work: u64,
    /// How long it has not moved.
    pub since: Duration,
}

#[derive(Debug)]
struct Watched {
    pulse: Weak<Pulse>,
    /// What was seen last: entered and moved.
    seen: (u64, u64),
    since: Instant,
}

/// All pulses that one supervisor looks at.
#[derive(Debug, Default)]
pub struct Pulses {
    inner: Mutex<(Vec<Watched>, Option<Instant>)>,
}

impl Pulses {
    fn lock(&self) -> MutexGuard<'_, (Vec<Watched>, Option<Instant>)> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new stage's pulse; it is forgotten with the stage.
    pub fn register(&self, actor: &'static str, place: String) -> Arc<Pulse> {
        self.register_patient(actor, place, Duration::ZERO)
    }

    /// The pulse of a whole thread, for what hangs outside of every handler. An actor that hangs inside one is found before
    /// it, and named.
    pub fn register_thread(&self, actor: &'static str, place: String, limit: Duration) -> Arc<Pulse> {
        let pulse = self.register_patient(actor, place, limit + limit / 2);
        pulse.holds(1, None);
        pulse
    }

    /// The same, and the thread keeps it moving.
    pub fn watch_thread(&self, thread: &ArbiterHandle, actor: &'static str, place: String, limit: Duration) {
        thread.spawn(beat(self.register_thread(actor, place, limit)));
    }

    /// A new pulse of a stage that may take so long without moving, whatever the limit.
    pub fn register_patient(&self, actor: &'static str, place: String, patience: Duration) -> Arc<Pulse> {
        let state = Mutex::default();
        let pulse = Arc::new(Pulse {
            actor,
            place,
            patience,
            state,
        });
        self.lock().0.push(Watched {
            pulse: Arc::downgrade(&pulse),
            seen: (0, 0),
            since: Instant::now(),
        });
        pulse
    }

    /// Looks at every pulse: the stage that has not moved for `limit` although it should. One whose thread hangs comes before
    /// those that only wait for that thread.
    pub fn stalled(&self, now: Instant, limit: Duration) -> Option<Stall> {
        let (watched, looked) = &mut *self.lock();
        let gap = looked.replace(now).map_or(Duration::ZERO, |at| now - at);
        let mut found: Option<Stall> = None;
        watched.retain_mut(|it| {
            let Some(pulse) = it.pulse.upgrade() else { return false };
            let state = pulse.lock();
            let seen = (state.entered, state.moved);
            let moves = match state.inside {
                Some(_) => seen != it.seen,
                None => seen.1 != it.seen.1 || state.work == 0 || state.waits_for.is_some(),
            };
            if moves {
                (it.seen, it.since) = (seen, now);
            } else if gap >= LATE {
                it.since += gap;
            }
            let since = now.saturating_duration_since(it.since);
            if since >= limit.max(pulse.patience)
                && found
                    .as_ref()
                    .is_none_or(|found| found.inside.is_none() && state.inside.is_some())
            {
                found = Some(Stall {
                    actor: pulse.actor,
                    place: pulse.place.clone(),
                    inside: state.inside,
                    last: state.last,
                    work: state.work,
                    since,
                });
            }
            true
        });
        found
    }

    /// Lets every stage have its time again: something was done about the one that stalled.
    pub fn forgive(&self, now: Instant) {
        self.lock().0.iter_mut().for_each(|it| it.since = now);
    }

    /// Forgets every stage: they are being replaced, and what is left of them is nobody's any more.
    pub fn clear(&self) {
        self.lock().0.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(10);

    /// Looks each half second, as a supervisor does, until a stall is found or `seconds` have passed.
    fn watch(pulses: &Pulses, start: &mut Instant, seconds: u64) -> Option<Stall> {
        for _ in 0..seconds * 2 {
            *start += Duration::from_millis(500);
            if let Some(stall) = pulses.stalled(*start, LIMIT) {
                return Some(stall);
            }
        }
        None
    }

    #[test]
    fn work_without_movement_is_a_stall_but_not_while_it_waits_for_somebody_else() {
        let (pulses, mut now) = (Pulses::default(), Instant::now());
        let pulse = pulses.register("remote_link", "lane 0".into());
        assert_eq!(watch(&pulses, &mut now, 60), None, "no work");
        pulse.moved("a batch was acked");
        pulse.holds(3, Some("the peer"));
        assert_eq!(watch(&pulses, &mut now, 60), None, "the peer is away");
        pulse.holds(3, None);
        assert_eq!(watch(&pulses, &mut now, 9), None);
        pulse.moved("a batch was acked");
        assert_eq!(watch(&pulses, &mut now, 9), None, "it moved");
        let stall = watch(&pulses, &mut now, 2).expect("it does not move any more");
        assert_eq!(
            (stall.actor, &stall.place[..], stall.work),
            ("remote_link", "lane 0", 3)
        );
        assert_eq!((stall.inside, stall.last), (None, Some("a batch was acked")));
        assert!(stall.since >= LIMIT);
    }

    #[test]
    fn a_handler_that_does_not_return_is_a_stall_whatever_it_waits_for_and_comes_first() {
        let (pulses, mut now) = (Pulses::default(), Instant::now());
        let waiting = pulses.register("cache_reader", "lane 0".into());
        let hung = pulses.register("batch_coalescer", "lane 0".into());
        waiting.holds(1, None);
        hung.holds(0, Some("the link"));
        let inside = hung.enter("took items");
        let stall = watch(&pulses, &mut now, 11).expect("it hangs");
        assert_eq!((stall.actor, stall.inside), ("batch_coalescer", Some("took items")));
        drop(inside);
        waiting.holds(0, None);
        assert_eq!(watch(&pulses, &mut now, 20), None);
    }

    #[test]
    fn many_short_handlers_are_no_stall() {
        let (pulses, mut now) = (Pulses::default(), Instant::now());
        let pulse = pulses.register("cache_writer", "server".into());
        for _ in 0..60 {
            let _inside = pulse.enter("took a part");
            assert_eq!(watch(&pulses, &mut now, 1), None);
        }
    }

    #[test]
    fn a_process_that_was_frozen_blames_no_stage_for_it() {
        let (pulses, mut now) = (Pulses::default(), Instant::now());
        let pulse = pulses.register("cache_writer", "server".into());
        pulse.holds(1, None);
        assert_eq!(watch(&pulses, &mut now, 5), None);
        now += Duration::from_secs(3600);
        assert_eq!(watch(&pulses, &mut now, 4), None);
        assert!(
            watch(&pulses, &mut now, 3).is_some(),
            "it did not move afterwards either"
        );
    }

    #[test]
    fn a_stage_that_is_gone_is_forgotten() {
        let (pulses, mut now) = (Pulses::default(), Instant::now());
        pulses.register("cache_writer", "server".into()).holds(1, None);
        assert_eq!(watch(&pulses, &mut now, 20), None);
        assert!(pulses.lock().0.is_empty());
    }
}
