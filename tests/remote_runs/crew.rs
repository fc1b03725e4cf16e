//! Many clients at once: each gets what it gets alone, whoever else is there.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use luna_broker::client::{Client, Input};
use luna_broker::config::BrokerConfig;
use luna_broker::service::{AdapterMode, AdapterStack, BlockCache, RunSettings, Service, StepInput, UnetInput};

use crate::config;
use crate::support::{Place, broker_at, client_at, eventually};
use crate::{Scene, TOLERANCE, difference, given, made, values};

const CLIENTS: usize = 8;

/// Each client's adapters; the first has none.
const STACKS: [&str; 7] = ["lora@0.8", "lora@-0.5", "loha@1", "lokr@1", "dora-rows@1", "lora@0.8+set@1", "oft@1"];

fn stack(scene: &Scene, client: usize) -> AdapterStack {
    match client.checked_sub(1).and_then(|at| STACKS.get(at)) {
        Some(stack) => scene.stack(stack, AdapterMode::Auto),
        None => AdapterStack::default(),
    }
}

/// A latent of a client's own, in a round.
fn latent(client: usize, round: usize) -> (luna_broker::tensor::TensorMeta, Vec<u8>) {
    made(&[2, 4, 8, 8], |at| ((at * (client + 2)) as f32 * 0.13 + round as f32 * 0.01).sin())
}

fn step<'a>(scene: &'a Scene, x: Input<'a>) -> StepInput<Input<'a>> {
    StepInput { x, ..scene.step() }
}

/// What the model gives without adapters for inputs of several kinds.
fn plains(scene: &Scene, client: &Client) -> Vec<Vec<f32>> {
    let unet = scene.unet(client);
    let of = |x: Input<'_>| values(&unet.step(&UnetInput { x, ..scene.input() }).unwrap());
    let (far, wide) = (made(&[2, 4, 8, 8], |at| (at % 7) as f32 - 3.0), made(&[2, 4, 12, 10], |at| (at as f32).cos()));
    let mut all: Vec<_> = (0..4).map(|who| of(given(&latent(who, who)))).collect();
    all.extend([of(scene.input().x), of(given(&far)), of(given(&wide))]);
    all
}

fn alone(scene: &Scene, client: &Client, who: usize, rounds: usize) -> Vec<Vec<f32>> {
    let run = scene.unet(client).run(RunSettings { adapters: stack(scene, who), ..RunSettings::default() }).unwrap();
    (0..rounds).map(|round| values(&run.step(&step(scene, given(&latent(who, round))), &[0, 1]).unwrap())).collect()
}

/// All clients' steps interleaved, held against what each gets alone. By the requests that ran together, the working
/// memory that was told of them.
fn interleaved(scene: &Scene, max_batch: Option<usize>, expected: &[Vec<Vec<f32>>]) -> BTreeMap<u32, BTreeSet<u64>> {
    let place = Place::new();
    let _broker = broker_at(&place, BrokerConfig { max_batch, ..config() });
    let first = client_at(&place);
    let plain = plains(scene, &first);
    let told = Mutex::new(BTreeMap::<u32, BTreeSet<u64>>::new());
    std::thread::scope(|scope| {
        for (who, expected) in expected.iter().enumerate() {
            let (place, told) = (&place, &told);
            scope.spawn(move || {
                let client = client_at(place);
                let adapters = stack(scene, who);
                let unet = scene.unet(&client);
                let run = unet.run(RunSettings { adapters: adapters.clone(), ..RunSettings::default() }).unwrap();
                for (round, expected) in expected.iter().enumerate() {
                    let x = latent(who, round);
                    let input = step(scene, given(&x));
                    // By turns as a step of a run and by itself.
                    let options = client.default_options();
                    let output = match round % 2 {
                        0 => run.call(&input, &[0, 1], &options).unwrap(),
                        _ => {
                            let input = UnetInput { x: given(&x), ..scene.input() };
                            unet.call(&input, &adapters, &options).unwrap()
                        }
                    };
                    told.lock().unwrap().entry(output.step.together).or_default().insert(output.step.working_bytes);
                    let off = difference(&values(&output.tensor), expected);
                    assert!(off <= TOLERANCE, "client {who} in round {round}: {off:e}");
                }
            });
        }
    });
    assert_eq!(plains(scene, &first), plain, "the model is as it was");
    let lane = first.status().unwrap().lanes.into_iter().find(|lane| lane.service == Service::Unet).unwrap();
    assert!(lane.batches <= lane.completed);
    if max_batch == Some(1) {
        assert_eq!(lane.batches, lane.completed);
    }
    told.into_inner().unwrap()
}

/// What each client gets alone.
fn each_alone(scene: &Scene, rounds: usize) -> Vec<Vec<Vec<f32>>> {
    let place = Place::new();
    let _broker = broker_at(&place, config());
    let client = client_at(&place);
    (0..CLIENTS).map(|who| alone(scene, &client, who, rounds)).collect()
}

#[test]
fn eight_clients_with_stacks_of_their_own_get_what_each_gets_alone() {
    let Some(scene) = Scene::of("sd15") else { return };
    // Sizes are tried to find out which pay.
    let told = interleaved(&scene, None, &each_alone(&scene, 100));
    assert!(told.len() > 1, "some ran together: {told:?}");
}

#[test]
fn they_do_whether_none_or_all_run_together_and_are_told_of_working_memory_for_all() {
    let Some(scene) = Scene::of("sd15") else { return };
    let expected = each_alone(&scene, 40);
    let apart = interleaved(&scene, Some(1), &expected);
    assert_eq!(apart.keys().copied().collect::<Vec<_>>(), [1]);
    let told = interleaved(&scene, Some(8), &expected);
    assert!(told.len() > 1, "some ran together: {told:?}");
    assert!(told.get(&1).is_none_or(|bytes| *bytes == apart[&1]));
    // All steps are of one size, so that so many of them need so much.
    let mut last = 0;
    for (together, bytes) in &told {
        assert!(bytes.len() == 1 && bytes.first() > Some(&last), "more together need more: {told:?}");
        last = bytes.first().copied().unwrap();
        assert!(last <= u64::from(*together) * apart[&1].first().unwrap(), "what is there once anyway: {told:?}");
    }
}

#[test]
fn runs_with_block_caches_run_together_and_decide_apart() {
    let Some(scene) = Scene::of("sd15") else { return };
    let place = Place::new();
    let _broker = broker_at(&place, BrokerConfig { max_batch: Some(8), ..config() });
    let together = AtomicU32::new(0);
    let verdicts = |threshold: f64, who: usize| {
        let client = client_at(&place);
        let cache = Some(BlockCache::new(threshold));
        let run = scene.unet(&client).run(RunSettings { cache, ..RunSettings::default() }).unwrap();
        let mut hits = Vec::new();
        for round in 0..40 {
            let x = latent(who, round);
            let timesteps = made(&[2], |_| 900.0 - round as f32);
            let input = StepInput { timesteps: given(&timesteps), ..step(&scene, given(&x)) };
            let output = run.call(&input, &[0, 1], &client.default_options()).unwrap();
            together.fetch_max(output.step.together, Ordering::Relaxed);
            hits.push((output.step.cache.unwrap().verdict, values(&output.tensor)));
        }
        hits
    };
    let thresholds = [0.0, 0.02, 0.05, 1e6];
    let alone: Vec<_> = thresholds.iter().enumerate().map(|(who, &threshold)| verdicts(threshold, who)).collect();
    let kinds: BTreeSet<_> = alone.iter().flatten().map(|(verdict, _)| verdict.name()).collect();
    assert!(kinds.contains("hit") && kinds.contains("different"), "{kinds:?}");
    let verdicts = &verdicts;
    let crowd: Vec<_> = std::thread::scope(|scope| {
        let each = thresholds.iter().enumerate().map(|(who, &threshold)| scope.spawn(move || verdicts(threshold, who)));
        each.collect::<Vec<_>>().into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    for (who, (alone, crowd)) in alone.iter().zip(&crowd).enumerate() {
        for (round, (alone, crowd)) in alone.iter().zip(crowd).enumerate() {
            assert_eq!(alone.0, crowd.0, "client {who} in round {round}");
            assert!(difference(&alone.1, &crowd.1) <= 2.0 * TOLERANCE, "client {who} in round {round}");
        }
    }
    assert!(together.into_inner() > 1, "some ran together");
}

/// Names the socket to a test that was started again to be killed.
const VICTIM: &str = "LUNA_BROKER_TEST_VICTIM";

/// Sets a flag when it is dropped.
struct Defer<'a>(&'a AtomicBool);

impl Drop for Defer<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A client that steps until it is killed; nothing where nobody started it for that.
#[test]
fn a_client_to_be_killed_steps_until_it_is() {
    let Ok(socket) = std::env::var(VICTIM) else { return };
    let scene = Scene::of("sd15").unwrap();
    let client = Client::connect(Some(&socket)).unwrap();
    let unet = scene.unet(&client);
    let settings = RunSettings {
        adapters: scene.stack("lora@1+loha@0.5+lokr@0.2", AdapterMode::Auto),
        cache: Some(BlockCache::new(0.1)),
        ..RunSettings::default()
    };
    let run = unet.run(settings).unwrap();
    for round in 0.. {
        let x = latent(30, round);
        run.step(&step(&scene, given(&x)), &[0, 1]).unwrap();
    }
}

#[test]
fn clients_killed_in_the_middle_of_a_step_leave_nothing_and_change_nobodys_result() {
    let Some(scene) = Scene::of("sd15") else { return };
    let place = Place::new();
    let _broker = broker_at(&place, BrokerConfig { max_batch: Some(8), ..config() });
    let first = client_at(&place);
    let rounds = 40;
    let expected: Vec<_> = (0..CLIENTS).map(|who| alone(&scene, &first, who, rounds)).collect();
    let plain = plains(&scene, &first);
    let victim = || {
        let mut command = std::process::Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "crew::a_client_to_be_killed_steps_until_it_is", "--nocapture"]);
        command.env(VICTIM, place.socket()).stdout(std::process::Stdio::null()).spawn().unwrap()
    };
    let of_victims = || first.status().unwrap().runs.into_iter().filter(|run| run.adapters == 3).collect::<Vec<_>>();
    let (together, over) = (AtomicU32::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let survivors: Vec<_> = (expected.iter().enumerate())
            .map(|(who, expected)| {
                let (place, scene, together, over) = (&place, &scene, &together, &over);
                scope.spawn(move || {
                    let client = client_at(place);
                    let settings = RunSettings { adapters: stack(scene, who), ..RunSettings::default() };
                    let run = scene.unet(&client).run(settings).unwrap();
                    // Whoever is killed is killed among others: they go on until that is over.
                    for (round, expected) in expected.iter().enumerate().cycle() {
                        if round == 0 && over.load(Ordering::Relaxed) {
                            break;
                        }
                        let x = latent(who, round);
                        let output = run.call(&step(scene, given(&x)), &[0, 1], &client.default_options()).unwrap();
                        together.fetch_max(output.step.together, Ordering::Relaxed);
                        let off = difference(&values(&output.tensor), expected);
                        assert!(off <= TOLERANCE, "client {who} in round {round}: {off:e}");
                    }
                })
            })
            .collect();
        // Also where this thread panics: the others would go on for ever.
        let _over = Defer(&over);
        for _ in 0..3 {
            let mut victim = victim();
            // It has stepped a few times, and steps again at once.
            eventually("steps of the one to be killed", || of_victims().iter().any(|run| run.report.steps > 3));
            victim.kill().unwrap();
            victim.wait().unwrap();
            eventually("the end of its run", || of_victims().is_empty());
        }
        assert!(survivors.iter().all(|survivor| !survivor.is_finished()), "all stepped until the last was killed");
    });
    assert!(together.into_inner() > 1, "some ran together");
    assert_eq!(plains(&scene, &first), plain, "the model is as it was");
    eventually("the end of all use of its adapters", || {
        first.status().unwrap().stacks.iter().all(|stack| stack.users == 0)
    });
    assert_eq!(first.status().unwrap().sessions_lost, 3);
}
