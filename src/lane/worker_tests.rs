use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, bounded, unbounded};

use super::*;
use crate::lane::Policy;

/// Says what happened to it; waits for `go` while it runs.
struct Probe {
    name: u64,
    /// Not ready before it is set.
    ready: Option<Arc<AtomicBool>>,
    go: Option<Receiver<()>>,
    tell: Sender<(u64, Result<bool, Refusal>)>,
}

impl Job for Probe {
    type Executor = Vec<u64>;

    fn is_ready(&self) -> bool {
        self.ready.as_ref().is_none_or(|ready| ready.load(Ordering::Relaxed))
    }

    fn run(self, executor: &mut Vec<u64>, stop: &StopSignal<'_>) {
        self.tell.send((self.name, Ok(stop.is_set()))).unwrap();
        assert_ne!(self.name, 13, "the unlucky job panics");
        if let Some(go) = self.go {
            go.recv().unwrap();
            self.tell.send((self.name, Ok(stop.is_set()))).unwrap();
        }
        executor.push(self.name);
    }

    fn refuse(self, why: Refusal) {
        self.tell.send((self.name, Err(why))).unwrap();
    }
}

struct Setup {
    lane: Lane<Probe>,
    go: Sender<()>,
    told: Receiver<(u64, Result<bool, Refusal>)>,
    tell: Sender<(u64, Result<bool, Refusal>)>,
}

/// A lane whose first job is running and waits.
fn occupied(capacity: usize) -> Setup {
    occupied_with(Queue::new(Policy::Fifo, capacity))
}

fn occupied_with(queue: Queue<Probe>) -> Setup {
    let lane = Lane::spawn("test", queue, Vec::new).unwrap();
    let (go, wait) = bounded(0);
    let (tell, told) = unbounded();
    let setup = Setup { lane, go, told, tell };
    setup.submit(1, 1, Some(wait), None);
    assert_eq!(setup.told.recv().unwrap(), (1, Ok(false)));
    setup
}

impl Setup {
    fn submit(&self, session: u64, name: u64, go: Option<Receiver<()>>, deadline: Option<Instant>) {
        let job = Probe { name, ready: None, go, tell: self.tell.clone() };
        self.lane.submit(Entry { session: SessionId(session), request: RequestId(name), deadline, job });
    }

    /// A job that is not ready before the answer is set.
    fn submit_unready(&self, session: u64, name: u64, deadline: Option<Instant>) -> Arc<AtomicBool> {
        let ready = Arc::new(AtomicBool::new(false));
        let job = Probe { name, ready: Some(Arc::clone(&ready)), go: None, tell: self.tell.clone() };
        self.lane.submit(Entry { session: SessionId(session), request: RequestId(name), deadline, job });
        ready
    }
}

#[test]
fn a_full_lane_refuses_at_once_while_a_job_runs() {
    let lane = occupied(1);
    lane.submit(1, 2, None, None);
    lane.submit(1, 3, None, None);
    assert_eq!(lane.told.recv().unwrap(), (3, Err(Refusal::Full { capacity: 1 })));
    lane.go.send(()).unwrap();
    assert_eq!(lane.told.recv().unwrap(), (1, Ok(false)));
    assert_eq!(lane.told.recv().unwrap(), (2, Ok(false)));
}

#[test]
fn a_waiting_job_is_cancelled_at_once_and_a_running_one_told() {
    let lane = occupied(4);
    lane.submit(1, 2, None, None);
    lane.lane.cancel(SessionId(1), RequestId(2));
    assert_eq!(lane.told.recv().unwrap(), (2, Err(Refusal::Cancelled)));
    lane.lane.cancel(SessionId(2), RequestId(1));
    lane.lane.cancel(SessionId(1), RequestId(1));
    lane.go.send(()).unwrap();
    assert_eq!(lane.told.recv().unwrap(), (1, Ok(true)));
}

#[test]
fn the_stop_signal_of_one_job_does_not_reach_the_next() {
    let lane = occupied(4);
    lane.submit(1, 2, None, None);
    lane.lane.cancel(SessionId(1), RequestId(1));
    lane.go.send(()).unwrap();
    assert_eq!(lane.told.recv().unwrap(), (1, Ok(true)));
    assert_eq!(lane.told.recv().unwrap(), (2, Ok(false)));
}

#[test]
fn jobs_of_an_ended_session_never_reach_the_executor() {
    let lane = occupied(4);
    lane.submit(7, 2, None, None);
    lane.submit(8, 3, None, None);
    lane.lane.end_session(SessionId(7));
    assert_eq!(lane.told.recv().unwrap(), (2, Err(Refusal::SessionEnded)));
    lane.go.send(()).unwrap();
    assert_eq!(lane.told.recv().unwrap(), (1, Ok(false)));
    assert_eq!(lane.told.recv().unwrap(), (3, Ok(false)));
}

#[test]
fn a_job_that_waited_past_its_deadline_is_answered_and_not_run() {
    let lane = occupied(4);
    lane.submit(1, 2, None, Some(Instant::now().checked_sub(Duration::from_nanos(1)).unwrap()));
    lane.go.send(()).unwrap();
    assert_eq!(lane.told.recv().unwrap(), (1, Ok(false)));
    assert_eq!(lane.told.recv().unwrap(), (2, Err(Refusal::Expired)));
}

#[test]
fn a_panicking_job_does_not_take_the_lane_with_it() {
    let lane = occupied(4);
    lane.submit(1, 13, None, None);
    lane.submit(1, 14, None, None);
    lane.go.send(()).unwrap();
    let told: Vec<_> = (0..3).map(|_| lane.told.recv().unwrap().0).collect();
    assert_eq!(told, [1, 13, 14]);
}

#[test]
fn a_job_that_is_not_ready_waits_and_the_others_do_not() {
    let lane = occupied(4);
    let ready = lane.submit_unready(1, 2, None);
    lane.submit(2, 3, None, None);
    lane.go.send(()).unwrap();
    assert_eq!(lane.told.recv().unwrap(), (1, Ok(false)));
    assert_eq!(lane.told.recv().unwrap(), (3, Ok(false)));
    ready.store(true, Ordering::Relaxed);
    assert_eq!(lane.told.recv().unwrap(), (2, Ok(false)));
}

#[test]
fn a_job_that_is_asked_whether_it_is_ready_waits_and_does_not_run() {
    let lane = occupied(4);
    lane.go.send(()).unwrap();
    assert_eq!(lane.told.recv().unwrap(), (1, Ok(false)));
    let ready = lane.submit_unready(1, 2, None);
    while lane.lane.counts().completed == 0 {
        std::thread::yield_now();
    }
    // In the queue or just being asked, which alternates: counted once either way.
    let until = Instant::now() + Duration::from_millis(20);
    while Instant::now() < until {
        let LaneCounts { queued, busy, .. } = lane.lane.counts();
        assert_eq!((queued, busy), (1, false));
    }
    ready.store(true, Ordering::Relaxed);
    assert_eq!(lane.told.recv().unwrap(), (2, Ok(false)));
}

#[test]
fn a_job_that_does_not_become_ready_is_refused_however_it_comes_to_that() {
    let lane = occupied_with(Queue::new(Policy::Fifo, 8).patience(Duration::from_millis(5)));
    lane.go.send(()).unwrap();
    assert_eq!(lane.told.recv().unwrap(), (1, Ok(false)));
    lane.submit_unready(1, 2, None);
    assert!(matches!(lane.told.recv().unwrap(), (2, Err(Refusal::Unready { .. }))));
    let lane = occupied(8);
    lane.go.send(()).unwrap();
    assert_eq!(lane.told.recv().unwrap(), (1, Ok(false)));
    lane.submit_unready(1, 2, Some(Instant::now() + Duration::from_millis(5)));
    assert_eq!(lane.told.recv().unwrap(), (2, Err(Refusal::Expired)));
    lane.submit_unready(1, 3, None);
    lane.lane.cancel(SessionId(1), RequestId(3));
    // In the queue or at its turn at that moment.
    assert_eq!(lane.told.recv().unwrap(), (3, Err(Refusal::Cancelled)));
    lane.submit_unready(7, 4, None);
    lane.lane.end_session(SessionId(7));
    assert!(matches!(lane.told.recv().unwrap(), (4, Err(Refusal::SessionEnded | Refusal::Cancelled))));
    lane.submit_unready(1, 5, None);
    lane.lane.shut_down();
    assert_eq!(lane.told.recv().unwrap(), (5, Err(Refusal::ShuttingDown)));
}

#[test]
fn shutting_down_finishes_the_running_job_and_answers_the_rest() {
    let lane = occupied(4);
    lane.submit(1, 2, None, None);
    std::thread::scope(|scope| {
        scope.spawn(|| lane.lane.shut_down());
        assert_eq!(lane.told.recv().unwrap(), (2, Err(Refusal::ShuttingDown)));
        lane.submit(1, 3, None, None);
        assert_eq!(lane.told.recv().unwrap(), (3, Err(Refusal::ShuttingDown)));
        lane.go.send(()).unwrap();
        assert_eq!(lane.told.recv().unwrap(), (1, Ok(false)));
    });
    assert_eq!(lane.lane.counts().completed, 1);
}

/// Runs with its likes: says which ran together, and which of them were to stop by then.
struct Social {
    name: u64,
    kind: u64,
    go: Option<Receiver<()>>,
    tell: Sender<Vec<(u64, bool)>>,
}

impl Job for Social {
    type Executor = usize;

    fn run(self, executor: &mut usize, stop: &StopSignal<'_>) {
        if let Some(go) = self.go {
            go.recv().unwrap();
        }
        *executor += 1;
        self.tell.send(vec![(self.name, stop.is_set())]).unwrap();
    }

    fn refuse(self, _: Refusal) {
        self.tell.send(Vec::new()).unwrap();
    }

    fn most_together(&self, _: &usize) -> usize {
        3
    }

    fn goes_with(&self, other: &Self) -> bool {
        self.kind == other.kind
    }

    fn run_together(jobs: Vec<(Self, StopSignal<'_>)>, executor: &mut usize) {
        *executor += 1;
        if let Some(go) = jobs.iter().find_map(|(job, _)| job.go.as_ref()) {
            go.recv().unwrap();
        }
        let told = jobs.iter().map(|(job, stop)| (job.name, stop.is_set())).collect();
        jobs[0].0.tell.send(told).unwrap();
    }
}

#[test]
fn jobs_that_go_together_are_run_at_once_up_to_what_the_first_allows() {
    let lane: Lane<Social> = Lane::spawn("test", Queue::new(Policy::Fifo, 16), || 0).unwrap();
    let (tell, told) = unbounded();
    let (go, wait) = bounded(0);
    let submit = |name, kind, go| {
        let job = Social { name, kind, go, tell: tell.clone() };
        lane.submit(Entry { session: SessionId(name), request: RequestId(name), deadline: None, job });
    };
    submit(1, 9, Some(wait.clone()));
    // They wait behind the first, which has nobody to go with.
    while lane.counts().queued > 0 {
        std::thread::yield_now();
    }
    for (name, kind) in [(2, 0), (3, 1), (4, 0), (5, 0), (6, 0)] {
        submit(name, kind, (name == 2).then(|| wait.clone()));
    }
    go.send(()).unwrap();
    assert_eq!(told.recv().unwrap(), [(1, false)]);
    // The three run by now; one of them and one that waits are taken back.
    while lane.counts().queued > 2 {
        std::thread::yield_now();
    }
    lane.cancel(SessionId(4), RequestId(4));
    go.send(()).unwrap();
    assert_eq!(told.recv().unwrap(), [(2, false), (4, true), (5, false)]);
    assert_eq!(told.recv().unwrap(), [(3, false)]);
    assert_eq!(told.recv().unwrap(), [(6, false)]);
    lane.shut_down();
    let counts = lane.counts();
    assert_eq!((counts.completed, counts.batches), (6, 4));
}

/// What the lane's thread owns here: says when it is put in order, and when that is to be done again.
struct Orderly {
    again: Option<Duration>,
    tell: Sender<&'static str>,
}

struct Order;

impl Job for Order {
    type Executor = Orderly;

    fn run(self, executor: &mut Orderly, _stop: &StopSignal<'_>) {
        executor.tell.send("run").unwrap();
    }

    fn refuse(self, _why: Refusal) {}

    fn tidy(executor: &mut Orderly) -> Option<Instant> {
        // The test may be over.
        _ = executor.tell.send("tidy");
        executor.again.take().map(|pause| Instant::now() + pause)
    }
}

#[test]
fn a_lane_is_put_in_order_after_each_job_when_it_is_woken_and_when_it_asked_for_it() {
    let (tell, told) = unbounded();
    let again = Some(Duration::from_millis(1));
    let lane = Lane::spawn("test", Queue::new(Policy::Fifo, 1), move || Orderly { again, tell }).unwrap();
    let heard = || told.recv_timeout(Duration::from_secs(20)).unwrap();
    let wake = lane.waker();
    lane.submit(Entry { session: SessionId(1), request: RequestId(1), deadline: None, job: Order });
    assert_eq!([heard(), heard(), heard()], ["run", "tidy", "tidy"]);
    wake();
    assert_eq!(heard(), "tidy");
    drop(lane);
    wake();
    assert_eq!(told.recv(), Err(crossbeam_channel::RecvError), "asked for no more often than that");
}
