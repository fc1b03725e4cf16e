//! The block cache of a run: when a step is left out, and what it gives then.

use std::sync::Arc;

use luna_broker::client::{Input, Run};
use luna_broker::device::InProcessDevice;
use luna_broker::model::torch::{LoadOptions, Patches, Target, load_unet};
use luna_broker::model::{ModelFile, WeightStorage};
use luna_broker::service::{BlockCache, CacheVerdict, Control, RunSettings, StepInput, UnetInput};
use luna_broker::tensor::TensorMeta;
use tch::Tensor;

use crate::config;
use crate::support::{Place, broker_at, client_at};
use crate::{Scene, TOLERANCE, difference, given, made, values};

/// One step at a timestep, on a latent that is a little different each time.
struct Walk {
    context: (TensorMeta, Vec<u8>),
}

impl Walk {
    fn of(width: u64) -> Self {
        Self { context: made(&[2, 5, width], |at| (at as f32 * 0.17).sin()) }
    }

    fn go(&self, run: &Run, timestep: f32, shift: f32, conds: &[u32]) -> (Vec<f32>, Option<CacheVerdict>) {
        self.step(run, timestep, conds, &made(&[2, 4, 8, 8], |at| (at as f32 * 0.37).sin() + shift), None)
    }

    /// The same with a latent and a `y` of one's own.
    fn step(
        &self,
        run: &Run,
        timestep: f32,
        conds: &[u32],
        x: &(TensorMeta, Vec<u8>),
        y: Option<&(TensorMeta, Vec<u8>)>,
    ) -> (Vec<f32>, Option<CacheVerdict>) {
        let timesteps = made(&[2], |_| timestep);
        let input = StepInput {
            x: given(x),
            timesteps: given(&timesteps),
            context: Some(given(&self.context)),
            y: y.map(given),
            control: None,
        };
        let output = run.call(&input, conds, &Default::default()).unwrap();
        (values(&output.tensor), output.step.cache.map(|cache| cache.verdict))
    }
}

#[test]
fn a_step_like_the_last_is_left_out_and_one_that_is_not_is_computed() {
    use CacheVerdict::{Different, Empty, Hit, Restarted};
    let Some(scene) = Scene::of("sd15") else { return };
    let place = Place::new();
    let _broker = broker_at(&place, config());
    let client = client_at(&place);
    let unet = scene.unet(&client);
    let walk = Walk::of(unet.info().unet.as_ref().unwrap().context_width);
    let run = |cache| unet.run(RunSettings { cache, ..RunSettings::default() }).unwrap();
    let (plain, never, always, some) =
        (run(None), run(Some(BlockCache::new(0.0))), run(Some(BlockCache::new(1e6))), run(Some(BlockCache::new(0.2))));
    let mut kept = 0.0;
    for (at, (timestep, shift)) in
        [(900.0, 0.0), (899.0, 0.0), (898.0, 0.0), (897.0, 2.0), (950.0, 2.0)].into_iter().enumerate()
    {
        let (out, verdict) = walk.go(&plain, timestep, shift, &[0, 1]);
        assert_eq!(verdict, None);
        let (same, verdict) = walk.go(&never, timestep, shift, &[0, 1]);
        assert_eq!(same, out, "a threshold of 0 changes nothing");
        assert_eq!(verdict, Some([Empty, Different, Different, Different, Restarted][at]));
        let (_, verdict) = walk.go(&always, timestep, shift, &[0, 1]);
        assert_eq!(verdict, Some([Empty, Hit, Hit, Hit, Restarted][at]));
        let (near, verdict) = walk.go(&some, timestep, shift, &[0, 1]);
        assert_eq!(verdict, Some([Empty, Hit, Hit, Different, Restarted][at]), "step {at}");
        match verdict {
            Some(Hit) => kept = difference(&near, &out).max(kept),
            _ => assert_eq!(near, out, "step {at}"),
        }
    }
    assert!(kept > 1e-3, "a step that is left out is not the one that was computed: {kept:e}");
    let report = some.report();
    assert_eq!((report.steps, report.hits), (5, 2));
    assert!(report.computed_s > 0.0 && report.hit_s > 0.0 && report.speed_up() > 1.0, "{report:?}");
    let status = client.status().unwrap();
    assert_eq!(status.runs.iter().map(|run| run.report.hits).collect::<Vec<_>>(), [0, 0, 3, 2]);
    let metrics = client.metrics().unwrap();
    assert!(metrics.contains(r#"luna_broker_block_cache_steps_total{verdict="hit"} 5"#));
    for verdict in ["hit", "empty"] {
        let seconds = format!(r#"luna_broker_block_cache_step_seconds_total{{verdict="{verdict}"}} "#);
        let line = metrics.lines().find_map(|line| line.strip_prefix(&seconds)).expect("it is counted");
        assert!(line.parse::<f64>().unwrap() > 0.0, "{line}");
    }
}

#[test]
fn what_a_hit_gives_is_the_first_block_now_and_the_rest_as_it_was() {
    let Some(scene) = Scene::of("sd15") else { return };
    let place = Place::new();
    let _broker = broker_at(&place, config());
    let client = client_at(&place);
    let run =
        scene.unet(&client).run(RunSettings { cache: Some(BlockCache::new(1e6)), ..RunSettings::default() }).unwrap();
    let file = Arc::new(ModelFile::open(scene.model().as_ref()).unwrap());
    let options = LoadOptions {
        target: &Target::Cpu,
        storage: WeightStorage::Mapped,
        memory: &InProcessDevice,
        progress: &|_, _| (),
    };
    let unet = load_unet(file, options).unwrap();
    let input = scene.step();
    let tensor = |input: Input<'_>, bytes: &[u8]| {
        let shape: Vec<i64> = input.meta().shape.as_slice().iter().map(|&extent| extent as i64).collect();
        Tensor::from_data_size(bytes, &shape, tch::Kind::Float)
    };
    let of = |name: &str| tensor(scene.find(name).unwrap(), &scene.tensors[&format!("plain.{name}")].1);
    let other = made(input.x.meta().shape.as_slice(), |at| (at as f32 * 0.41).cos());
    let (x, context, timesteps) = (of("x"), of("context"), of("timesteps"));
    let started = |x: Tensor| {
        let input = UnetInput {
            x,
            timesteps: timesteps.shallow_clone(),
            context: context.shallow_clone(),
            y: None,
            control: None,
        };
        unet.start(&input, &Patches::none()).unwrap()
    };
    let (before, now) = (started(x), started(tensor(given(&other), &other.1)));
    let rest = unet.rest(&before).unwrap() - before.h1();
    let expected = unet.finish(&now, &(now.h1() + rest)).unwrap();
    run.step(&input, &[0, 1]).unwrap();
    let hit = StepInput { x: given(&other), context: None, ..input };
    let output = run.call(&hit, &[0, 1], &Default::default()).unwrap();
    assert_eq!(output.step.cache.unwrap().verdict, CacheVerdict::Hit);
    let expected: Vec<f32> = Vec::try_from(expected.flatten(0, -1)).unwrap();
    assert!(difference(&values(&output.tensor), &expected) <= TOLERANCE);
}

#[test]
fn conds_contexts_control_and_sizes_have_states_of_their_own() {
    use CacheVerdict::{Control as ControlChanged, Empty, Hit};
    let Some(scene) = Scene::of("sd15") else { return };
    let place = Place::new();
    let _broker = broker_at(&place, config());
    let client = client_at(&place);
    let unet = scene.unet(&client);
    let width = unet.info().unet.as_ref().unwrap().context_width;
    let (walk, mut other) = (Walk::of(width), Walk::of(width));
    other.context = made(&[2, 5, width], |at| (at as f32 * 0.5).cos());
    let run = unet.run(RunSettings { cache: Some(BlockCache::new(0.5)), ..RunSettings::default() }).unwrap();
    let verdict = |walk: &Walk, timestep, conds: &[u32]| walk.go(&run, timestep, 0.0, conds).1.unwrap();
    assert_eq!(verdict(&walk, 900.0, &[0, 1]), Empty);
    assert_eq!(verdict(&walk, 890.0, &[0, 1]), Hit, "the same context again is the same");
    assert_eq!(verdict(&walk, 890.0, &[2, 3]), Empty, "other conds");
    assert_eq!(verdict(&walk, 880.0, &[2, 3]), Hit);
    assert_eq!(verdict(&other, 880.0, &[0, 1]), Empty, "another context");
    assert_eq!(verdict(&walk, 870.0, &[2, 3]), Hit, "which is none of its business");
    // A control, with other values, and gone.
    let (x, timesteps) = (made(&[2, 4, 8, 8], |at| (at as f32 * 0.37).sin()), made(&[2], |_| 860.0));
    let middle = unet.info().clone();
    assert!(middle.unet.is_some());
    let controlled = |strength: f32| {
        // The middle's shape is told by the refusal of a wrong one.
        let wrong = made(&[2, 1, 1, 1], |_| 0.0);
        let step = |tensor| StepInput {
            x: given(&x),
            timesteps: given(&timesteps),
            context: None,
            y: None,
            control: Some(Control { middle: vec![Some(tensor)], ..Control::default() }),
        };
        let error = run.step(&step(given(&wrong)), &[2, 3]).unwrap_err().message().to_owned();
        let shape = error.split(['[', ']']).nth(1).unwrap().split(", ").map(|one| one.parse().unwrap());
        let right = made(&shape.collect::<Vec<u64>>(), |at| (at as f32 * 0.7).sin() * strength);
        run.call(&step(given(&right)), &[2, 3], &Default::default()).unwrap().step.cache.unwrap().verdict
    };
    assert_eq!(controlled(1.0), ControlChanged, "a control came");
    assert_eq!(controlled(1.01), Hit);
    assert_eq!(controlled(3.0), ControlChanged, "it changed");
    assert_eq!(verdict(&walk, 850.0, &[2, 3]), ControlChanged, "it went");
}

#[test]
fn what_was_kept_for_a_latent_of_another_size_is_not_compared_with() {
    use CacheVerdict::{Empty, Hit};
    let Some(scene) = Scene::of("sd15") else { return };
    let place = Place::new();
    let _broker = broker_at(&place, config());
    let client = client_at(&place);
    let unet = scene.unet(&client);
    let walk = Walk::of(unet.info().unet.as_ref().unwrap().context_width);
    let run = |cache| unet.run(RunSettings { cache, ..RunSettings::default() }).unwrap();
    let (cached, plain) = (run(Some(BlockCache::new(1e6))), run(None));
    let steps =
        [(10, 8, Empty), (10, 8, Hit), (8, 8, Empty), (8, 8, Hit), (8, 10, Empty), (10, 8, Empty), (10, 8, Hit)];
    for (at, (height, width, expected)) in steps.into_iter().enumerate() {
        let x = made(&[2, 4, height, width], |at| (at as f32 * 0.37).sin());
        let timestep = 900.0 - at as f32;
        let (out, verdict) = walk.step(&cached, timestep, &[0, 1], &x, None);
        assert_eq!(verdict, Some(expected), "step {at} of {height} x {width}");
        let computed = walk.step(&plain, timestep, &[0, 1], &x, None).0;
        assert_eq!(out.len(), computed.len());
        assert!(expected == Hit || out == computed, "step {at} was computed");
    }
}

#[test]
fn what_was_computed_with_another_y_is_not_compared_with() {
    use CacheVerdict::{Empty, Hit};
    let Some(scene) = Scene::of("sdxl") else { return };
    let place = Place::new();
    let _broker = broker_at(&place, config());
    let client = client_at(&place);
    let unet = scene.unet(&client);
    let facts = unet.info().unet.clone().unwrap();
    let walk = Walk::of(facts.context_width);
    let run = |cache| unet.run(RunSettings { cache, ..RunSettings::default() }).unwrap();
    let (cached, plain) = (run(Some(BlockCache::new(1e6))), run(None));
    let x = made(&[2, 4, 8, 8], |at| (at as f32 * 0.37).sin());
    let y = |pace: f32| made(&[2, facts.vector_width.unwrap()], |at| (at as f32 * pace).cos());
    let (one, other) = (y(0.3), y(0.7));
    // One of the two rows is as before.
    let mut half = other.clone();
    let middle = half.1.len() / 2;
    half.1[middle..].copy_from_slice(&one.1[middle..]);
    let steps = [
        (Some(&one), Empty, "the first"),
        (Some(&one), Hit, "the same again"),
        (None, Hit, "that of before"),
        (Some(&other), Empty, "another"),
        (None, Hit, "that of before"),
        (Some(&half), Empty, "one row's is another"),
    ];
    for (at, (y, expected, what)) in steps.into_iter().enumerate() {
        let timestep = 900.0 - at as f32;
        let (out, verdict) = walk.step(&cached, timestep, &[0, 1], &x, y);
        assert_eq!(verdict, Some(expected), "{what}");
        let computed = walk.step(&plain, timestep, &[0, 1], &x, y).0;
        assert!(expected == Hit || out == computed, "{what}: it was computed");
    }
}

#[test]
fn range_and_patience_bound_what_is_left_out() {
    use CacheVerdict::{Empty, Exhausted, Hit, Outside};
    let Some(scene) = Scene::of("sd15") else { return };
    let place = Place::new();
    let _broker = broker_at(&place, config());
    let client = client_at(&place);
    let unet = scene.unet(&client);
    let walk = Walk::of(unet.info().unet.as_ref().unwrap().context_width);
    let verdicts = |cache: BlockCache, sigmas: Vec<f64>, timesteps: &[f32]| {
        let run = unet.run(RunSettings { cache: Some(cache), sigmas, ..RunSettings::default() }).unwrap();
        timesteps.iter().map(|&timestep| walk.go(&run, timestep, 0.0, &[0]).1.unwrap()).collect::<Vec<_>>()
    };
    let timesteps = [900.0, 899.0, 898.0, 897.0, 896.0];
    let cache = BlockCache::new(1e6);
    let patient = BlockCache { max_hits: Some(1), ..cache };
    assert_eq!(verdicts(patient, Vec::new(), &timesteps), [Empty, Hit, Exhausted, Hit, Exhausted]);
    let none = BlockCache { max_hits: Some(0), ..cache };
    assert_eq!(verdicts(none, Vec::new(), &timesteps[..2]), [Empty, Exhausted]);
    // By steps of the run where they are known, else by the timestep.
    let ranged = BlockCache { start: 0.4, end: 0.8, ..cache };
    let sigmas = vec![5.0, 4.0, 3.0, 2.0, 1.0, 0.0];
    assert_eq!(verdicts(ranged, sigmas, &timesteps), [Outside, Outside, Hit, Hit, Outside]);
    assert_eq!(verdicts(ranged, Vec::new(), &[900.0, 500.0, 400.0, 300.0, 100.0]), [Outside, Hit, Hit, Hit, Outside]);
}
