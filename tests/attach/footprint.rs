//! Thousands of cycles with workers killed in the middle: nothing grows.

use crate::file::counted;
use crate::obey::worker;
use crate::process::named_segments;
use crate::scene::Scene;
use crate::support::eventually;

/// Workers killed; each has gone through at least a hundred cycles by then.
const KILLS: u64 = 24;
/// Workers at a time.
const CROWD: u64 = 4;

#[test]
fn nothing_grows_while_workers_attach_publish_and_die() {
    let scene = Scene::new(&[]);
    let path = counted(&scene.place, "model.safetensors", 5, 3000);
    let segments = named_segments();
    let mut crowd = std::collections::VecDeque::new();
    let mut settled = None;
    for seed in 0..KILLS {
        let mut churning = worker(&scene, &format!("worker-{seed}"));
        churning.tell(&format!("churn {} {seed}", path.display()));
        crowd.push_back(churning);
        if crowd.len() as u64 == CROWD {
            let mut victim = crowd.pop_front().unwrap();
            let heard = victim.hear();
            assert_eq!(heard.as_deref(), Some("warm"));
            victim.kill();
            scene.check_bystander();
        }
        if seed == KILLS / 3 {
            crowd.clear();
            alone(&scene);
            settled = Some((scene.footprint(), scene.bystander.status().unwrap().weights.len()));
        }
    }
    crowd.clear();
    alone(&scene);
    let (before, sets) = settled.unwrap();
    assert!(sets <= 6, "{sets}");
    eventually("the footprint of before", || {
        let now = scene.footprint();
        let sets_now = scene.bystander.status().unwrap().weights.len();
        // How many contents the three names mean at the end is chance: each is a descriptor and a mapping.
        let more = sets_now.saturating_sub(sets);
        now.threads <= before.threads
            && now.descriptors <= before.descriptors + more
            && now.arenas <= before.arenas + more
    });
    let (mappings, now) = (before.mappings, scene.footprint().mappings);
    assert!(now <= mappings + 64, "{mappings} mappings became {now}");
    assert!(named_segments() <= segments);
    scene.check_bystander();
}

fn alone(scene: &Scene) {
    eventually("the end of all other sessions", || {
        let status = scene.bystander.status().unwrap();
        status.sessions.len() == 1 && status.weights.iter().all(|set| set.holders.is_empty())
    });
}

#[test]
fn sets_that_nobody_holds_give_way_long_before_descriptors_run_out() {
    let scene = Scene::new(&[]);
    let client = crate::support::client_at(&scene.place);
    for at in 0..600 {
        let weights = crate::file::publish(&client, &format!("name-{at}"), at as f32, 16).unwrap();
        assert_eq!(crate::file::first(&weights, "t0"), at as f32);
        drop(weights);
        if at % 50 == 0 {
            eventually("giving back", || {
                scene.bystander.status().unwrap().weights.iter().all(|set| set.holders.is_empty())
            });
        }
    }
    assert!(scene.bystander.status().unwrap().weights.len() <= 256);
    assert!(scene.footprint().descriptors < 400, "{:?}", scene.footprint());
    scene.check_bystander();
}
