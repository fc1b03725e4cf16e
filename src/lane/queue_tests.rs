use std::time::Duration;

use proptest::prelude::*;

use super::*;

fn entry(session: u64, request: u64) -> Entry<()> {
    Entry { session: SessionId(session), request: RequestId(request), deadline: None, job: () }
}

fn run(queue: &mut Queue<()>, now: Instant) -> Option<(u64, u64)> {
    match queue.pop(now)? {
        Next::Run(Turn { entry, .. }) => Some((entry.session.0, entry.request.0)),
        Next::Expired(_) | Next::Later(_) => None,
    }
}

#[test]
fn a_full_queue_gives_the_job_back() {
    let mut queue = Queue::new(Policy::Fifo, 1);
    queue.push(entry(1, 1)).unwrap();
    assert_eq!(queue.push(entry(2, 2)), Err(entry(2, 2)));
    assert_eq!(queue.len(), 1);
}

#[test]
fn a_job_whose_caller_stopped_waiting_is_not_run() {
    let now = Instant::now();
    let mut queue = Queue::new(Policy::Fifo, 4);
    queue.push(Entry { deadline: Some(now), ..entry(1, 1) }).unwrap();
    queue.push(Entry { deadline: Some(now + Duration::from_secs(1)), ..entry(1, 2) }).unwrap();
    assert!(matches!(queue.pop(now), Some(Next::Expired(expired)) if expired.request == RequestId(1)));
    assert_eq!(run(&mut queue, now), Some((1, 2)));
}

#[test]
fn a_session_with_many_jobs_does_not_hold_up_the_others() {
    let now = Instant::now();
    let mut queue = Queue::new(Policy::FairBySession, 16);
    for request in 0..4 {
        queue.push(entry(1, request)).unwrap();
    }
    queue.push(entry(2, 10)).unwrap();
    queue.push(entry(3, 20)).unwrap();
    let order: Vec<_> = std::iter::from_fn(|| run(&mut queue, now)).collect();
    assert_eq!(order, [(1, 0), (2, 10), (3, 20), (1, 1), (1, 2), (1, 3)]);
}

#[test]
fn the_jobs_of_an_ended_session_are_all_taken_back() {
    let mut queue = Queue::new(Policy::Fifo, 16);
    for at in 0..6 {
        queue.push(entry(at % 2, at)).unwrap();
    }
    assert_eq!(queue.end_session(SessionId(1)).len(), 3);
    let now = Instant::now();
    let order: Vec<_> = std::iter::from_fn(|| run(&mut queue, now)).collect();
    assert_eq!(order, [(0, 0), (0, 2), (0, 4)]);
}

/// The next turn, which must be of that request.
fn turn_of(queue: &mut Queue<()>, request: u64, now: Instant) -> Turn<()> {
    match queue.pop(now) {
        Some(Next::Run(turn)) if turn.entry.request == RequestId(request) => turn,
        other => panic!("{other:?} instead of request {request}"),
    }
}

#[test]
fn a_job_that_is_not_ready_keeps_its_place_and_holds_nobody_up() {
    let now = Instant::now();
    let mut queue = Queue::new(Policy::Fifo, 4);
    for request in 1..=3 {
        queue.push(entry(request, request)).unwrap();
    }
    let unready = turn_of(&mut queue, 1, now);
    queue.set_aside(unready, now).unwrap();
    turn_of(&mut queue, 2, now);
    // By now it may be, and it came before the third.
    let unready = turn_of(&mut queue, 1, now + FIRST_PAUSE);
    queue.set_aside(unready, now + FIRST_PAUSE).unwrap();
    turn_of(&mut queue, 3, now + FIRST_PAUSE);
    assert_eq!(queue.len(), 1);
}

#[test]
fn a_job_that_is_not_ready_takes_nobodys_place_in_a_full_queue() {
    let mut now = Instant::now();
    let mut queue = Queue::new(Policy::Fifo, 1);
    queue.push(entry(1, 1)).unwrap();
    for _ in 0..2 {
        let unready = turn_of(&mut queue, 1, now);
        queue.set_aside(unready, now).unwrap();
        now += LONGEST_PAUSE;
    }
    queue.push(entry(2, 2)).unwrap();
    assert_eq!(queue.push(entry(3, 3)), Err(entry(3, 3)));
    // Neither does it while it is asked again.
    let unready = turn_of(&mut queue, 1, now);
    turn_of(&mut queue, 2, now);
    queue.push(entry(3, 3)).unwrap();
    queue.set_aside(unready, now).unwrap();
    assert_eq!((queue.len(), queue.capacity()), (2, 1));
}

#[test]
fn a_job_that_is_not_ready_is_asked_again_ever_less_often() {
    let mut now = Instant::now();
    let mut queue = Queue::new(Policy::Fifo, 4);
    queue.push(entry(1, 1)).unwrap();
    let mut pauses = Vec::new();
    for _ in 0..8 {
        let turn = turn_of(&mut queue, 1, now);
        assert_eq!(turn.is_first(), pauses.is_empty());
        queue.set_aside(turn, now).unwrap();
        let Some(Next::Later(again)) = queue.pop(now) else { panic!("it was asked just now") };
        pauses.push((again - now).as_micros());
        now = again;
    }
    assert_eq!(pauses, [50, 100, 200, 400, 800, 1000, 1000, 1000]);
}

#[test]
fn a_job_that_does_not_become_ready_is_given_up() {
    let now = Instant::now();
    let mut queue = Queue::new(Policy::Fifo, 4).patience(Duration::from_millis(1));
    queue.push(entry(1, 1)).unwrap();
    let turn = turn_of(&mut queue, 1, now);
    queue.set_aside(turn, now).unwrap();
    let late = now + Duration::from_millis(2);
    // The lane was busy for that long: it is asked once more all the same.
    let turn = turn_of(&mut queue, 1, late);
    let overdue = queue.set_aside(turn, late).unwrap_err();
    assert_eq!((overdue.entry, overdue.waited), (entry(1, 1), Duration::from_millis(2)));
    assert_eq!(queue.pop(late), None);
}

#[test]
fn a_job_that_is_not_ready_can_be_taken_back_and_expires() {
    let now = Instant::now();
    let mut queue = Queue::new(Policy::Fifo, 4);
    queue.push(entry(1, 1)).unwrap();
    queue.push(Entry { deadline: Some(now + FIRST_PAUSE), ..entry(2, 2) }).unwrap();
    queue.push(entry(3, 3)).unwrap();
    for request in 1..=3 {
        let turn = turn_of(&mut queue, request, now);
        queue.set_aside(turn, now).unwrap();
    }
    assert_eq!(queue.cancel(SessionId(1), RequestId(1)), Some(entry(1, 1)));
    assert_eq!(queue.end_session(SessionId(3)), [entry(3, 3)]);
    assert!(matches!(queue.pop(now + FIRST_PAUSE), Some(Next::Expired(gone)) if gone.request == RequestId(2)));
}

#[test]
fn a_turn_that_came_to_nothing_does_not_count_as_service() {
    let now = Instant::now();
    let mut queue = Queue::new(Policy::FairBySession, 8);
    for (session, request) in [(1, 1), (1, 2), (2, 3)] {
        queue.push(entry(session, request)).unwrap();
    }
    let turn = turn_of(&mut queue, 1, now);
    queue.set_aside(turn, now).unwrap();
    // Neither session was served: order of arrival decides.
    turn_of(&mut queue, 2, now);
    turn_of(&mut queue, 3, now);
}

proptest! {
    /// Against the obvious model: for each job, who should go first by the definition of the policy.
    #[test]
    fn order_is_what_the_policy_says(
        fair: bool,
        steps in prop::collection::vec(prop_oneof![3 => (0u64..4).prop_map(Some), 2 => Just(None)], 0..80),
    ) {
        let now = Instant::now();
        let mut queue = Queue::new(if fair { Policy::FairBySession } else { Policy::Fifo }, 1000);
        let mut naive: Vec<(u64, u64)> = Vec::new();
        let mut history: Vec<u64> = Vec::new();
        for (request, step) in steps.into_iter().enumerate() {
            if let Some(session) = step {
                queue.push(entry(session, request as u64)).unwrap();
                naive.push((session, request as u64));
                continue;
            }
            let expected = if fair {
                let waited = |session: u64| history.iter().rposition(|&served| served == session);
                let longest = naive.iter().map(|(session, _)| waited(*session)).min();
                naive.iter().position(|(session, _)| Some(waited(*session)) == longest)
            } else {
                (!naive.is_empty()).then_some(0)
            };
            let expected = expected.map(|at| naive.remove(at));
            prop_assert_eq!(run(&mut queue, now), expected);
            history.extend(expected.map(|(session, _)| session));
        }
    }
}

#[test]
fn those_taken_along_go_in_the_order_of_the_policy_and_count_as_served() {
    let now = Instant::now();
    let mut queue = Queue::new(Policy::FairBySession, 16);
    let named = |session, job: u64| Entry { session: SessionId(session), request: RequestId(job), deadline: None, job };
    for (session, job) in [(1, 10), (1, 11), (2, 20), (3, 31), (2, 22)] {
        queue.push(named(session, job)).unwrap();
    }
    let Some(Next::Run(first)) = queue.pop(now) else { panic!("one waits") };
    assert_eq!(first.entry.job, 10);
    // Odd ones do not go along; of the rest session 2 comes first, as session 1 was just served.
    let along = queue.take_along(2, now, |job| job % 2 == 0);
    assert_eq!(along.iter().map(|entry| entry.job).collect::<Vec<_>>(), [20, 22]);
    // Session 3 was never served, then comes the one that was served longest ago.
    let rest: Vec<_> = std::iter::from_fn(|| match queue.pop(now)? {
        Next::Run(turn) => Some(turn.entry.job),
        other => panic!("{other:?}"),
    })
    .collect();
    assert_eq!(rest, [31, 11]);
}

#[test]
fn of_one_session_none_is_taken_along_before_an_earlier_one() {
    let now = Instant::now();
    let mut queue = Queue::new(Policy::FairBySession, 16);
    let named = |session, job: u64| Entry { session: SessionId(session), request: RequestId(job), deadline: None, job };
    for (session, job) in [(1, 10), (2, 21), (2, 22), (3, 32), (3, 34)] {
        queue.push(named(session, job)).unwrap();
    }
    assert!(matches!(queue.pop(now), Some(Next::Run(turn)) if turn.entry.job == 10));
    // 22 goes along, and 21, which came earlier from the same session, does not.
    let along = queue.take_along(5, now, |job| job % 2 == 0);
    assert_eq!(along.iter().map(|entry| entry.job).collect::<Vec<_>>(), [32, 34]);
    assert!(matches!(queue.pop(now), Some(Next::Run(turn)) if turn.entry.job == 21));
    assert_eq!(queue.take_along(5, now, |job| job % 2 == 0).len(), 1);
}

#[test]
fn what_is_late_or_not_due_is_not_taken_along() {
    let now = Instant::now();
    let mut queue = Queue::new(Policy::Fifo, 16);
    queue.push(entry(1, 1)).unwrap();
    let unready = turn_of(&mut queue, 1, now);
    queue.set_aside(unready, now).unwrap();
    queue.push(Entry { deadline: Some(now), ..entry(2, 2) }).unwrap();
    queue.push(entry(3, 3)).unwrap();
    let along = queue.take_along(5, now, |()| true);
    assert_eq!(along.iter().map(|entry| entry.request).collect::<Vec<_>>(), [RequestId(3)]);
    assert_eq!(queue.take_along(5, now + FIRST_PAUSE, |()| true).len(), 1, "the one set aside is due");
    assert!(matches!(queue.pop(now), Some(Next::Expired(_))));
}
