//! What evrepl relies on in actix 0.13, one fact a test (DESIGN section 8). When an upgrade turns one of these red, the
//! code that leans on the fact, the hand-off and the supervisors above all, has to be thought over before the test is.

#![allow(clippy::disallowed_methods, reason = "pins the behaviour that makes them disallowed")]

use std::future::Future;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use actix::dev::{ContextFutureSpawner, SendError};
use actix::{
    Actor, ActorContext, ActorFutureExt, Addr, Arbiter, AsyncContext, AtomicResponse, Context, Handler, Message,
    ResponseFuture, Running, Supervised, Supervisor, System, WrapFuture,
};
use tokio::sync::oneshot;

/// actix's `DEFAULT_CAPACITY`.
const DEFAULT_CAPACITY: usize = 16;

/// What happened, in order, as the actors tell it.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<String>>>);

impl Log {
    fn add(&self, line: impl Into<String>) {
        self.0.lock().unwrap().push(line.into());
    }

    fn lines(&self) -> Vec<String> {
        self.0.lock().unwrap().clone()
    }

    fn count(&self, line: &str) -> usize {
        self.lines().iter().filter(|found| *found == line).count()
    }
}

/// Says in the log when it is dropped.
struct Guard(Log, &'static str);

impl Drop for Guard {
    fn drop(&mut self) {
        self.0.add(self.1);
    }
}

struct Probe {
    log: Log,
    restarts: usize,
}

impl Probe {
    fn new(log: &Log) -> Probe {
        Probe {
            log: log.clone(),
            restarts: 0,
        }
    }
}

impl Actor for Probe {
    type Context = Context<Self>;

    fn started(&mut self, _: &mut Self::Context) {
        self.log.add("started");
    }

    fn stopping(&mut self, _: &mut Self::Context) -> Running {
        self.log.add("stopping");
        Running::Stop
    }

    fn stopped(&mut self, _: &mut Self::Context) {
        self.log.add("stopped");
        if PANIC_IN_STOPPED.load(SeqCst) {
            panic!("a second panic, in stopped()");
        }
    }
}

impl Supervised for Probe {
    fn restarting(&mut self, _: &mut Self::Context) {
        self.restarts += 1;
        self.log.add("restarting");
    }
}

static PANIC_IN_STOPPED: AtomicBool = AtomicBool::new(false);

#[derive(Message)]
#[rtype(result = "()")]
struct Note(&'static str);

impl Handler<Note> for Probe {
    type Result = ();

    fn handle(&mut self, Note(line): Note, _: &mut Self::Context) {
        self.log.add(line);
    }
}

/// A message that is an obligation: it says when it goes, handled or not.
#[derive(Message)]
#[rtype(result = "()")]
struct Obligation(#[expect(dead_code, reason = "held for its drop")] Guard);

impl Handler<Obligation> for Probe {
    type Result = ();

    fn handle(&mut self, _: Obligation, _: &mut Self::Context) {
        self.log.add("handled");
    }
}

#[derive(Message)]
#[rtype(result = "usize")]
struct Restarts;

impl Handler<Restarts> for Probe {
    type Result = usize;

    fn handle(&mut self, _: Restarts, _: &mut Self::Context) -> usize {
        self.restarts
    }
}

/// Anything done inside the actor.
#[derive(Message)]
#[rtype(result = "()")]
struct Do<F: FnOnce(&mut Probe, &mut Context<Probe>)>(F);

impl<F: FnOnce(&mut Probe, &mut Context<Probe>)> Handler<Do<F>> for Probe {
    type Result = ();

    fn handle(&mut self, Do(act): Do<F>, ctx: &mut Self::Context) {
        act(self, ctx);
    }
}

/// Answered by an `AtomicResponse` when the channel is.
#[derive(Message)]
#[rtype(result = "()")]
struct HoldAtomically(oneshot::Receiver<()>);

impl Handler<HoldAtomically> for Probe {
    type Result = AtomicResponse<Self, ()>;

    fn handle(&mut self, HoldAtomically(release): HoldAtomically, _: &mut Self::Context) -> Self::Result {
        AtomicResponse::new(Box::pin(released(release).into_actor(self)))
    }
}

/// Answered by a `ResponseFuture` when the channel is.
#[derive(Message)]
#[rtype(result = "&'static str")]
struct AnswerLater(oneshot::Receiver<()>);

impl Handler<AnswerLater> for Probe {
    type Result = ResponseFuture<&'static str>;

    fn handle(&mut self, AnswerLater(release): AnswerLater, _: &mut Self::Context) -> Self::Result {
        Box::pin(async move {
            released(release).await;
            "answered"
        })
    }
}

async fn released(release: oneshot::Receiver<()>) {
    let _ = release.await;
}

fn in_system(test: impl Future<Output = ()>) {
    System::new().block_on(test);
}

/// Lets everything else run until the condition holds; the limit is only for a test that would hang.
async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let waiting = async {
        while !condition() {
            tokio::task::yield_now().await;
        }
    };
    let limit = tokio::time::timeout(Duration::from_secs(20), waiting);
    limit.await.unwrap_or_else(|_| panic!("never came true: {what}"));
}

/// Lets the arbiter work: another actor on it is asked and answers this often.
async fn work_elsewhere() {
    let witness = Probe::new(&Log::default()).start();
    for _ in 0..100 {
        witness.send(Restarts).await.unwrap();
    }
}

/// Starts an actor that takes nothing from its mailbox until the sender is used or dropped.
async fn frozen(log: &Log) -> (Addr<Probe>, oneshot::Sender<()>) {
    let (release, held) = oneshot::channel();
    let addr = Probe::new(log).start();
    addr.send(Do(|actor: &mut Probe, ctx: &mut Context<Probe>| {
        ctx.wait(released(held).into_actor(actor))
    }))
    .await
    .unwrap();
    (addr, release)
}

fn fill(addr: &Addr<Probe>) -> usize {
    (0..).take_while(|_| addr.try_send(Note("note")).is_ok()).count()
}

#[test]
fn a_mailbox_holds_sixteen_messages_unless_told_otherwise() {
    in_system(async {
        let log = Log::default();
        let addr = Probe::new(&log).start();
        // Nothing is awaited, so the actor, on this very thread, cannot take any.
        assert_eq!(fill(&addr), DEFAULT_CAPACITY);
        assert!(matches!(
            addr.try_send(Note("note")),
            Err(SendError::Full(Note("note")))
        ));
        until("room again", || log.count("note") == DEFAULT_CAPACITY).await;
        assert_eq!(fill(&addr), DEFAULT_CAPACITY);
    });
}

#[test]
fn a_mailbox_of_three_holds_three_and_one_of_zero_is_unbounded() {
    in_system(async {
        let log = Log::default();
        let sized = |capacity| {
            Probe::create(|ctx| {
                ctx.set_mailbox_capacity(capacity);
                Probe::new(&log)
            })
        };
        assert_eq!(fill(&sized(3)), 3);
        let unbounded = sized(0);
        assert!((0..10_000).all(|_| unbounded.try_send(Note("note")).is_ok()));
    });
}

#[test]
fn do_send_and_notify_ignore_the_capacity() {
    in_system(async {
        let log = Log::default();
        let addr = Probe::new(&log).start();
        fill(&addr);
        for _ in 0..1_000 {
            addr.do_send(Note("sent"));
        }
        addr.do_send(Do(|_: &mut Probe, ctx: &mut Context<Probe>| {
            (0..1_000).for_each(|_| ctx.notify(Note("notified")));
        }));
        until("all are handled", || {
            log.count("sent") == 1_000 && log.count("notified") == 1_000
        })
        .await;
    });
}

#[test]
fn an_awaited_send_ignores_the_capacity_too() {
    in_system(async {
        let log = Log::default();
        let (addr, release) = frozen(&log).await;
        fill(&addr);
        let mut requests: Vec<_> = (0..1_000).map(|_| Box::pin(addr.send(Note("sent")))).collect();
        for request in &mut requests {
            assert!(futures_util::poll!(request).is_pending());
        }
        // Nobody polls the requests again: what arrives now was pushed at their first poll, into a full mailbox.
        drop(release);
        until("all are handled", || log.count("sent") == 1_000).await;
    });
}

#[test]
fn only_a_handle_that_is_never_cloned_sees_a_full_mailbox() {
    in_system(async {
        let log = Log::default();
        let (addr, release) = frozen(&log).await;
        assert_eq!(fill(&addr), DEFAULT_CAPACITY);
        for _ in 0..1_000 {
            assert!(addr.clone().try_send(Note("cloned")).is_ok());
            assert!(addr.clone().recipient::<Note>().try_send(Note("cloned")).is_ok());
        }
        assert!(matches!(addr.try_send(Note("note")), Err(SendError::Full(_))));
        drop(release);
        until("all are handled", || log.count("cloned") == 2_000).await;
    });
}

#[test]
fn a_mailbox_is_emptied_without_a_budget_so_that_a_flood_starves_the_arbiter() {
    in_system(async {
        let log = Log::default();
        let addr = Probe::new(&log).start();
        tokio::task::yield_now().await;
        let other = log.clone();
        addr.do_send(Note("flood"));
        actix::spawn(async move { other.add("other") });
        for _ in 1..50_000 {
            addr.do_send(Note("flood"));
        }
        until("both ran", || log.count("flood") == 50_000 && log.count("other") == 1).await;
        assert_eq!(log.lines().last().map(String::as_str), Some("other"));
    });
}

#[test]
fn a_supervisor_restarts_a_stopped_actor_with_its_value_and_its_mailbox() {
    in_system(async {
        let log = Log::default();
        let inner = log.clone();
        let addr = Supervisor::start(move |_| Probe::new(&inner));
        addr.do_send(Do(|_: &mut Probe, ctx: &mut Context<Probe>| ctx.stop()));
        addr.do_send(Note("queued"));
        assert_eq!(addr.send(Restarts).await, Ok(1));
        let story = ["started", "stopping", "stopped", "restarting", "started", "queued"];
        assert_eq!(log.lines(), story);
        assert!(addr.connected());
    });
}

#[test]
fn a_restart_drops_the_futures_that_the_actor_spawned() {
    in_system(async {
        let log = Log::default();
        let inner = log.clone();
        let addr = Supervisor::start(move |_| Probe::new(&inner));
        let guard = Guard(log.clone(), "dropped");
        addr.do_send(Do(move |actor: &mut Probe, ctx: &mut Context<Probe>| {
            let never = async move {
                std::future::pending::<()>().await;
                drop(guard);
            };
            never.into_actor(actor).spawn(ctx);
        }));
        work_elsewhere().await;
        assert_eq!(log.count("dropped"), 0);
        addr.do_send(Do(|_: &mut Probe, ctx: &mut Context<Probe>| ctx.stop()));
        assert_eq!(addr.send(Restarts).await, Ok(1));
        assert_eq!(log.count("dropped"), 1);
    });
}

#[test]
fn a_supervisor_knows_neither_delay_nor_limit() {
    // A runtime without timers: whoever asked it for a delay would panic.
    let without_timers = || tokio::runtime::Builder::new_current_thread().build().unwrap();
    System::with_tokio_rt(without_timers).block_on(async {
        let addr = Supervisor::start(|_| Probe::new(&Log::default()));
        for _ in 0..10_000 {
            addr.do_send(Do(|_: &mut Probe, ctx: &mut Context<Probe>| ctx.stop()));
        }
        assert_eq!(addr.send(Restarts).await, Ok(10_000));
    });
}

#[test]
fn a_supervisor_ends_when_the_last_address_goes() {
    in_system(async {
        let log = Log::default();
        let inner = log.clone();
        let addr = Supervisor::start(move |_| Probe::new(&inner));
        addr.send(Restarts).await.unwrap();
        drop(addr);
        until("it stopped", || log.count("stopped") == 1).await;
        work_elsewhere().await;
        assert_eq!(log.count("restarting"), 0);
    });
}

#[test]
fn a_response_future_outlives_a_restart() {
    in_system(async {
        let inner = Log::default();
        let addr = Supervisor::start(move |_| Probe::new(&inner));
        let (release, held) = oneshot::channel();
        let mut answer = pin!(addr.send(AnswerLater(held)));
        assert!(futures_util::poll!(answer.as_mut()).is_pending());
        addr.do_send(Do(|_: &mut Probe, ctx: &mut Context<Probe>| ctx.stop()));
        assert_eq!(addr.send(Restarts).await, Ok(1));
        drop(release);
        assert_eq!(answer.await, Ok("answered"));
    });
}

#[test]
fn a_panic_ends_the_actor_with_its_mailbox_but_not_the_arbiter() {
    in_system(async {
        let arbiter = Arbiter::new();
        let log = Log::default();
        let inner = log.clone();
        let addr = Supervisor::start_in_arbiter(&arbiter.handle(), move |_| Probe::new(&inner));
        let (release, held) = std::sync::mpsc::channel::<()>();
        addr.do_send(Do(move |_: &mut Probe, _: &mut Context<Probe>| {
            let _ = held.recv();
            panic!("on purpose");
        }));
        addr.do_send(Obligation(Guard(log.clone(), "vanished")));
        let mut request = pin!(addr.send(Note("asked")));
        assert!(futures_util::poll!(request.as_mut()).is_pending());
        assert!(addr.connected());
        drop(release);

        // No supervisor brings it back, and what was queued is dropped unhandled.
        until("it is gone", || !addr.connected()).await;
        assert!(request.await.is_err());
        until("the queue is gone", || log.count("vanished") == 1).await;
        assert!(matches!(addr.try_send(Note("late")), Err(SendError::Closed(_))));
        // `stopping` and `stopped` ran on the broken actor.
        assert_eq!(log.lines(), ["started", "stopping", "stopped", "vanished"]);

        let inner = log.clone();
        let next = Probe::start_in_arbiter(&arbiter.handle(), move |_| Probe::new(&inner));
        assert_eq!(next.send(Restarts).await, Ok(0));
        arbiter.stop();
        assert!(arbiter.join().is_ok());
    });
}

#[test]
fn a_second_panic_while_the_first_unwinds_aborts_the_process() {
    const INSIDE: &str = "EVREPL_CONTRACT_ABORTS";
    if std::env::var_os(INSIDE).is_some() {
        PANIC_IN_STOPPED.store(true, SeqCst);
        in_system(async {
            let addr = Probe::new(&Log::default()).start();
            let _ = addr
                .send(Do(|_: &mut Probe, _: &mut Context<Probe>| panic!("the first panic")))
                .await;
        });
        return;
    }
    let name = "a_second_panic_while_the_first_unwinds_aborts_the_process";
    let run = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name])
        .env(INSIDE, "1")
        .output()
        .unwrap();
    // Killed by a signal: no exit code.
    assert_eq!(run.status.code(), None, "{}", String::from_utf8_lossy(&run.stdout));
}

/// Freezes an actor by `freeze`, shows that nothing in it moves, then that all of it does.
async fn stands_still(freeze: impl FnOnce(&Addr<Probe>, oneshot::Receiver<()>)) {
    let log = Log::default();
    let addr = Probe::new(&log).start();
    let (release, held) = oneshot::channel();
    let (begin, spawned) = oneshot::channel();
    let inner = log.clone();
    addr.do_send(Do(move |actor: &mut Probe, ctx: &mut Context<Probe>| {
        let then = async move { released(spawned).await }.into_actor(actor);
        then.map(move |(), _, _| inner.add("spawned")).spawn(ctx);
        ctx.run_later(Duration::ZERO, |actor, _| actor.log.add("timer"));
    }));
    freeze(&addr, held);
    addr.do_send(Note("message"));
    drop(begin);

    // Another actor's timer, set later, fires meanwhile.
    let other = Log::default();
    let witness = Probe::new(&other).start();
    witness.do_send(Do(|_: &mut Probe, ctx: &mut Context<Probe>| {
        ctx.run_later(Duration::ZERO, |actor, _| actor.log.add("timer"));
    }));
    until("the other timer fired", || other.count("timer") == 1).await;
    work_elsewhere().await;
    assert_eq!(log.lines(), ["started"]);

    drop(release);
    until("all of it moves", || {
        ["message", "spawned", "timer"].iter().all(|line| log.count(line) == 1)
    })
    .await;
}

#[test]
fn a_context_that_waits_freezes_mailbox_timers_and_spawned_futures() {
    in_system(stands_still(|addr, held| {
        addr.do_send(Do(|actor: &mut Probe, ctx: &mut Context<Probe>| {
            ctx.wait(released(held).into_actor(actor))
        }));
    }));
}

#[test]
fn an_atomic_response_freezes_them_as_well() {
    in_system(stands_still(|addr, held| addr.do_send(HoldAtomically(held))));
}

#[test]
fn a_stopped_system_drains_nothing() {
    let log = Log::default();
    let handled_elsewhere = Arc::new(AtomicUsize::new(0));
    let runner = System::new();
    let (_release, arbiter) = runner.block_on(async {
        let (addr, release) = frozen(&log).await;
        let arbiter = Arbiter::new();
        let inner = log.clone();
        let remote = Probe::start_in_arbiter(&arbiter.handle(), move |_| Probe::new(&inner));
        // An answer that the other arbiter's actor still waits for when the system stops.
        let count = handled_elsewhere.clone();
        remote.do_send(Do(move |actor: &mut Probe, ctx: &mut Context<Probe>| {
            count.fetch_add(1, SeqCst);
            ctx.wait(std::future::pending::<()>().into_actor(actor));
        }));
        addr.do_send(Obligation(Guard(log.clone(), "vanished")));
        remote.do_send(Obligation(Guard(log.clone(), "vanished")));
        until("the other arbiter's actor waits", || {
            handled_elsewhere.load(SeqCst) == 1
        })
        .await;
        System::current().stop();
        (release, arbiter)
    });
    runner.run().unwrap();
    arbiter.join().unwrap();
    assert_eq!((log.count("handled"), log.count("vanished")), (0, 2));
}
