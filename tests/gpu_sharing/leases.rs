use std::process::Command;

use luna_broker::ErrorKind;

use super::*;

#[test]
fn slots_are_reused_and_none_is_left() {
    play(Stage::new(), on_the_gpu(), |guest| {
        let client = guest.connect();
        let vae = client.vae(HAND_OFF).unwrap();
        let mut latent = OwnLatent::new(0, 64);
        for _ in 0..100 {
            latent.renew();
            latent.check(&decode(&vae, &latent).to_vec().unwrap()).unwrap();
        }
        eventually("the leases' return", || guest.sessions()[0]["leases"] == 0);
        assert_eq!(guest.sessions()[0]["input_slots"], 1, "the input slot is kept from call to call");
    });
}

#[test]
fn two_clients_share_the_arenas_and_not_their_tensors() {
    // Room for two pictures of 12.6 MB and not for a third.
    let config = BrokerConfig { gpu_arena_bytes: 32 * MIB, gpu_bytes: 32 * MIB, ..on_the_gpu() };
    play(Stage::new(), config, |guest| {
        let (one, two) = (guest.connect(), guest.connect());
        let (mine, theirs) = (OwnLatent::new(0, 128), OwnLatent::new(0, 128));
        let my_image = decode(&one.vae(HAND_OFF).unwrap(), &mine);
        let their_image = decode(&two.vae(HAND_OFF).unwrap(), &theirs);
        let full = two.vae(HAND_OFF).unwrap().call(DECODE, theirs.input(), &CallOptions::default()).unwrap_err();
        assert_eq!(full.kind(), ErrorKind::OutOfMemory, "{full}");
        assert!(full.to_string().contains("--gpu-bytes"), "{full}");
        mine.check(&my_image.to_vec().unwrap()).unwrap();
        theirs.check(&their_image.to_vec().unwrap()).unwrap();
        drop(my_image);
        eventually("room for another picture", || {
            two.vae(HAND_OFF).unwrap().call(DECODE, theirs.input(), &CallOptions::default()).is_ok()
        });
    });
}

/// A client of its own process, to be killed while it holds a picture.
const VICTIM: &str = "LUNA_BROKER_TEST_VICTIM_OF";

#[test]
fn what_a_killed_client_held_is_free_again() {
    if let Ok(socket) = std::env::var(VICTIM) {
        let client = Client::connect(Some(&socket)).unwrap();
        let _held = decode(&client.vae(HAND_OFF).unwrap(), &OwnLatent::new(0, 128));
        println!("holding");
        loop {
            std::thread::park();
        }
    }
    let config = BrokerConfig { gpu_arena_bytes: 16 * MIB, gpu_bytes: 16 * MIB, ..on_the_gpu() };
    play(Stage::new(), config, |guest| {
        let name = "leases::what_a_killed_client_held_is_free_again";
        let mut victim = Command::new(std::env::current_exe().unwrap())
            .args([name, "--exact", "--nocapture"])
            .env(VICTIM, &guest.socket)
            .spawn()
            .unwrap();
        let client = guest.connect();
        let latent = OwnLatent::new(0, 128);
        let vae = client.vae(HAND_OFF).unwrap();
        let call = || vae.call(DECODE, latent.input(), &CallOptions::default());
        eventually("the victim's picture", || {
            guest.sessions().as_array().unwrap().iter().any(|one| one["leases"] == 1)
        });
        assert_eq!(call().unwrap_err().kind(), ErrorKind::OutOfMemory);
        victim.kill().unwrap();
        victim.wait().unwrap();
        eventually("room for a picture", || call().is_ok());
    });
}

#[test]
fn a_client_that_leaves_without_tensors_leaves_nothing_behind() {
    play(Stage::new(), on_the_gpu(), |guest| {
        let latent = OwnLatent::new(0, 16);
        for _ in 0..3 {
            let leaving = guest.connect();
            decode_checked(&leaving, &latent);
            leaving.close();
            eventually("the session's end", || guest.sessions().as_array().unwrap().is_empty());
        }
    });
}

#[test]
fn a_tensor_of_an_earlier_session_is_no_input_of_a_later_one() {
    play(Stage::new(), on_the_gpu(), |guest| {
        let latent = OwnLatent::new(0, 16);
        let earlier = guest.connect();
        let mut built = earlier.empty_on_gpu(latent.meta, "cuda:0").unwrap();
        built.write(&bytes_of(&latent.values)).unwrap();
        let later = guest.connect();
        decode_checked(&later, &latent);
        let vae = later.vae(HAND_OFF).unwrap();
        let error = vae.call(DECODE, Input::try_from(&built).unwrap(), &CallOptions::default()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Stale, "{error}");
    });
}

#[test]
fn memory_of_a_client_that_left_but_lives_is_kept_from_others() {
    let config = BrokerConfig { gpu_arena_bytes: 16 * MIB, gpu_bytes: 16 * MIB, ..on_the_gpu() };
    play(Stage::new(), config, |guest| {
        let latent = OwnLatent::new(0, 128);
        let leaving = guest.connect();
        let image = decode(&leaving.vae(HAND_OFF).unwrap(), &latent);
        leaving.close();
        eventually("quarantine", || guest.sessions()[0]["quarantined"] == true);
        let client = guest.connect();
        let error = client.vae(HAND_OFF).unwrap().call(DECODE, latent.input(), &CallOptions::default()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::OutOfMemory, "{error}");
        latent.check(&image.to_vec().unwrap()).unwrap();
    });
}
