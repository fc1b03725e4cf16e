//! Publishers that do not keep to the rules.

use std::os::fd::OwnedFd;

use luna_broker::device::{DraftRegion, Region};
use luna_broker::id::RequestId;
use luna_broker::protocol::{
    ClientMessage, DraftOffer, MAX_TABLE_BYTES, Operation, Outcome, PublishRequest, WeightEntry, encode_table,
};
use luna_broker::tensor::{DType, Dims, digest_tensors};
use luna_broker::{ErrorKind, Fault};

use crate::file::{bytes, first, floats, publish};
use crate::raw::{Raw, Shared, request as request_of};
use crate::scene::Scene;
use crate::support::{client_at, eventually};

const LENGTH: u64 = 5000;

fn entry(key: &str, dtype: DType, shape: &[u64]) -> WeightEntry {
    WeightEntry { key: key.to_owned(), dtype, shape: Dims::new(shape).unwrap(), offset: 0 }
}

/// What a publisher announces that means [`LENGTH`] floats which count up from 1.
fn request(name: &str) -> (Operation, Vec<u8>) {
    let data = bytes(&floats(1.0, LENGTH as usize));
    let content = digest_tensors([("t0", DType::F32, &[LENGTH][..], &data[..])]);
    let table = encode_table(&[entry("t0", DType::F32, &[LENGTH])]).unwrap();
    (Operation::Publish(PublishRequest { name: name.to_owned(), content }), table)
}

/// Gets as far as memory to publish in.
fn offered(raw: &mut Raw, name: &str) -> (DraftOffer, OwnedFd) {
    let (operation, table) = request(name);
    match raw.ask(operation, &table) {
        Outcome::Draft(offer) => (*offer, raw.take_fd()),
        other => panic!("a draft was due, not {other:?}"),
    }
}

fn publisher(scene: &Scene) -> (Raw, Shared) {
    Raw::shared(&scene.place.socket())
}

fn filled(raw: &mut Raw, offer: &DraftOffer) -> Fault {
    raw.fault(Operation::PublishFilled { draft: offer.draft }, &[])
}

fn nothing_is_there(scene: &Scene) {
    assert!(scene.bystander.status().unwrap().weights.is_empty());
    scene.check_bystander();
}

#[test]
fn who_keeps_a_draft_mapped_for_writing_publishes_nothing() {
    let scene = Scene::new(&[]);
    let (mut raw, _memory) = publisher(&scene);
    let (offer, fd) = offered(&mut raw, "name");
    let region = DraftRegion::import(fd, offer.size_bytes as usize).unwrap();
    region.copy_in(0, &bytes(&floats(1.0, LENGTH as usize))).unwrap();
    let fault = filled(&mut raw, &offer);
    assert_eq!(fault.kind, ErrorKind::Protocol);
    assert!(fault.message.contains("still mapped") && fault.remedy.contains("unmap"), "{fault}");
    let again = filled(&mut raw, &offer);
    assert_eq!(again.kind, ErrorKind::Stale, "the draft is gone: {again}");
    nothing_is_there(&scene);
}

#[test]
fn who_publishes_something_else_than_announced_publishes_nothing() {
    let scene = Scene::new(&[]);
    let (mut raw, _memory) = publisher(&scene);
    let (offer, fd) = offered(&mut raw, "name");
    let region = DraftRegion::import(fd, offer.size_bytes as usize).unwrap();
    region.copy_in(0, &bytes(&floats(2.0, LENGTH as usize))).unwrap();
    drop(region);
    let fault = filled(&mut raw, &offer);
    assert_eq!(fault.kind, ErrorKind::InvalidTensor);
    assert!(fault.message.contains("announced"), "{fault}");
    nothing_is_there(&scene);
}

#[test]
fn memory_that_is_claimed_and_not_filled_is_not_read() {
    let scene = Scene::new(&["--weight-bytes", "99999G"]);
    let (mut raw, _memory) = publisher(&scene);
    let table = encode_table(&[entry("t0", DType::F32, &[1 << 40])]).unwrap();
    let Operation::Publish(request) = request("name").0 else { unreachable!() };
    let Outcome::Draft(offer) = raw.ask(Operation::Publish(request), &table) else { panic!("a draft was due") };
    drop(raw.take_fd());
    let fault = filled(&mut raw, &offer);
    assert_eq!(fault.kind, ErrorKind::InvalidTensor);
    assert!(fault.message.contains("not filled"), "{fault}");
    nothing_is_there(&scene);
}

#[test]
fn a_draft_belongs_to_its_session_and_dies_with_it() {
    let scene = Scene::new(&["--weight-bytes", "64K"]);
    let before = scene.footprint();
    let (mut raw, memory) = publisher(&scene);
    let offers: Vec<_> = (0..3).map(|at| offered(&mut raw, &format!("name-{at}"))).collect();
    let client = client_at(&scene.place);
    let error = publish(&client, "other", 9.0, LENGTH as usize).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::OutOfMemory, "drafts count: {error}");
    let (mut other, _memory) = publisher(&scene);
    let fault = filled(&mut other, &offers[0].0);
    assert_eq!(fault.kind, ErrorKind::Stale, "{fault}");
    drop(other);
    // One is given up, the others go with the session.
    raw.send(&ClientMessage::Abandon { draft: offers[0].0.draft });
    eventually("room for another set", || publish(&client, "other", 9.0, LENGTH as usize).is_ok());
    drop((raw, memory, offers));
    let large = || publish(&client, "large", 3.0, 3 * LENGTH as usize);
    eventually("the drafts' room", || large().is_ok());
    drop(client);
    scene
        .bystander
        .unload("large")
        .or_else(|_| scene.bystander.unload_with("large", luna_broker::protocol::Force::Yes))
        .unwrap();
    eventually("the end of all memory", || scene.footprint().is_back_to(&before));
    scene.check_bystander();
}

#[test]
fn what_is_complete_only_after_its_publisher_died_is_held_by_nobody() {
    /// Reading them takes longer than the end of a session.
    const ELEMENTS: u64 = 64 << 20;
    let scene = Scene::new(&[]);
    let (mut raw, memory) = publisher(&scene);
    let data = vec![1u8; 4 * ELEMENTS as usize];
    let content = digest_tensors([("t0", DType::F32, &[ELEMENTS][..], &data[..])]);
    let table = encode_table(&[entry("t0", DType::F32, &[ELEMENTS])]).unwrap();
    let publish = Operation::Publish(PublishRequest { name: "name".to_owned(), content });
    let Outcome::Draft(offer) = raw.ask(publish, &table) else { panic!("a draft was due") };
    let region = DraftRegion::import(raw.take_fd(), offer.size_bytes as usize).unwrap();
    region.copy_in(0, &data).unwrap();
    drop((region, data));
    raw.send(&request_of(1, Operation::PublishFilled { draft: offer.draft }));
    drop((raw, memory));
    eventually("the set", || !scene.bystander.status().unwrap().weights.is_empty());
    let status = scene.bystander.status().unwrap();
    assert_eq!(status.sessions.len(), 1, "the publisher was gone before");
    assert!(status.weights[0].holders.is_empty(), "{:#?}", status.weights);
    scene.bystander.unload("name").unwrap();
    scene.check_bystander();
}

#[test]
fn a_session_fills_few_drafts_at_a_time() {
    let scene = Scene::new(&[]);
    let (mut raw, _memory) = publisher(&scene);
    let mut offers = Vec::new();
    let fault = loop {
        let (operation, table) = request(&format!("name-{}", offers.len()));
        match raw.ask(operation, &table) {
            Outcome::Draft(offer) => offers.push((offer, raw.take_fd())),
            Outcome::Fault(fault) => break fault,
            other => panic!("{other:?}"),
        }
        assert!(offers.len() < 100);
    };
    assert_eq!(fault.kind, ErrorKind::Busy, "{fault}");
    raw.send(&ClientMessage::Abandon { draft: offers[0].0.draft });
    drop(offered(&mut raw, "another"));
    scene.check_bystander();
}

#[test]
fn a_name_that_others_took_meanwhile_is_left_to_them() {
    let scene = Scene::new(&[]);
    let (mut raw, _memory) = publisher(&scene);
    let (offer, fd) = offered(&mut raw, "name");
    let region = DraftRegion::import(fd, offer.size_bytes as usize).unwrap();
    region.copy_in(0, &bytes(&floats(1.0, LENGTH as usize))).unwrap();
    drop(region);
    let client = client_at(&scene.place);
    let held = publish(&client, "name", 2.0, LENGTH as usize).unwrap();
    let fault = filled(&mut raw, &offer);
    assert_eq!(fault.kind, ErrorKind::InUse, "{fault}");
    assert_eq!(first(&client.attach("name").unwrap(), "t0"), 2.0);
    drop(held);
    assert_eq!(scene.bystander.status().unwrap().weights.len(), 1, "what was filled is not kept");
    scene.check_bystander();
}

#[test]
fn a_table_of_anything_is_an_error_and_the_session_goes_on() {
    let scene = Scene::new(&[]);
    let (mut raw, _memory) = publisher(&scene);
    let table = |entries: &[WeightEntry]| encode_table(entries).unwrap();
    let half = u64::MAX / 2;
    let many: Vec<_> = (0..1000).map(|at| entry(&at.to_string(), DType::F32, &[1 << 52])).collect();
    let cases: [(&str, Vec<u8>); 10] = [
        ("nothing", Vec::new()),
        ("garbage", vec![0xc1; 1000]),
        ("a claimed length", vec![0xdd, 0xff, 0xff, 0xff, 0xff]),
        ("no tensors", table(&[])),
        ("cut short", table(&[entry("a", DType::F32, &[1])])[..5].to_vec()),
        ("more behind it", [table(&[entry("a", DType::F32, &[1])]), vec![0]].concat()),
        ("more than memory", table(&[entry("a", DType::U8, &[half])])),
        ("an overflow", table(&[entry("a", DType::F64, &[half, half, half])])),
        ("an overflow together", table(&many)),
        ("a key twice", table(&[entry("a", DType::U8, &[1]), entry("a", DType::U8, &[1])])),
    ];
    for (case, table) in cases {
        let fault = raw.fault(request("name").0, &table);
        eprintln!("{case}: {:?} {fault}", fault.kind);
        assert!(!fault.message.is_empty());
    }
    // Longer than any table: what follows it is understood all the same.
    let fault = raw.fault(request("name").0, &vec![0; MAX_TABLE_BYTES + 1]);
    eprintln!("too long: {:?} {fault}", fault.kind);
    let (offer, fd) = offered(&mut raw, "name");
    let region = DraftRegion::import(fd, offer.size_bytes as usize).unwrap();
    region.copy_in(0, &bytes(&floats(1.0, LENGTH as usize))).unwrap();
    drop(region);
    assert!(matches!(raw.ask(Operation::PublishFilled { draft: offer.draft }, &[]), Outcome::Attached(_)));
    scene.check_bystander();
}

#[test]
fn a_publication_that_is_taken_back_while_it_is_looked_at_is_none() {
    const LARGE: usize = 16 << 20;
    let scene = Scene::new(&[]);
    let (mut raw, _memory) = publisher(&scene);
    let data = bytes(&floats(1.0, LARGE));
    let content = digest_tensors([("t0", DType::F32, &[LARGE as u64][..], &data[..])]);
    let table = encode_table(&[entry("t0", DType::F32, &[LARGE as u64])]).unwrap();
    let publication = PublishRequest { name: "name".to_owned(), content };
    let Outcome::Draft(offer) = raw.ask(Operation::Publish(publication), &table) else { panic!("a draft was due") };
    let region = DraftRegion::import(raw.take_fd(), offer.size_bytes as usize).unwrap();
    region.copy_in(0, &data).unwrap();
    drop(region);
    raw.send(&request_of(7, Operation::PublishFilled { draft: offer.draft }));
    raw.send(&ClientMessage::Cancel { id: RequestId(7) });
    let Outcome::Fault(fault) = raw.reply().outcome else { panic!("nothing was to come of it") };
    assert_eq!(fault.kind, ErrorKind::Cancelled, "{fault}");
    nothing_is_there(&scene);
}
