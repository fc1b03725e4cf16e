use luna_broker::ErrorKind;
use luna_broker::client::AttachOptions;
use luna_broker::tensor::{CastRule, DType};

use crate::file::{counted, floats};
use crate::scene::Scene;
use crate::support::{client_at, eventually};

#[test]
fn two_clients_see_one_copy_and_each_its_own_writes() {
    let scene = Scene::new(&[]);
    let path = counted(&scene.place, "model.safetensors", 3, 5000);
    let name = path.to_string_lossy();
    let (one, two) = (client_at(&scene.place), client_at(&scene.place));
    let first = one.attach(&name).unwrap();
    let second = two.attach(&name).unwrap();
    assert_eq!(first.content(), second.content());
    let tensor = first.tensor("t1").unwrap();
    assert_eq!(tensor.values::<f32>().unwrap(), floats(1000.0, 5000));
    let status = one.status().unwrap();
    assert_eq!(status.weights.len(), 1);
    println!("{:#?}", status.weights);
    let set = &status.weights[0];
    assert_eq!((set.holders.len(), set.saved_bytes), (2, set.bytes));
    drop((first, tensor));
    eventually("giving back", || two.status().unwrap().weights[0].holders.len() == 1);
    let half = AttachOptions { rule: CastRule::all(DType::F16), ..AttachOptions::default() };
    let half = one.attach_with(&name, &half).unwrap();
    assert_eq!(half.tensor("t1").unwrap().values::<half::f16>().unwrap()[7], half::f16::from_f32(1007.0));
    assert_eq!(half.tensor("t9").unwrap_err().kind(), ErrorKind::InvalidTensor);
    scene.check_bystander();
}
