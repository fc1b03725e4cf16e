//! Who may listen where, and who may come in.

use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::Path;

use luna_broker::client::Client;
use luna_broker::{Error, ErrorKind};

use crate::Scene;
use crate::process::{BrokerProcess, serve_command};
use crate::support::{HAND_OFF, Latent, Place, client_at};

/// A user that owns nothing.
const NOBODY: u32 = 65534;

/// Runs `luna-broker serve`, which must end by itself; its exit code and what it said.
fn refused(mut command: std::process::Command) -> (Option<i32>, String) {
    let output = command.output().unwrap();
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn a_second_broker_at_the_same_socket_says_so_and_the_first_goes_on() {
    let scene = Scene::new(&[]);
    let (code, said) = refused(serve_command(&scene.place.socket(), &[]));
    assert_eq!(code, Some(2), "{said}");
    assert!(said.contains("another broker already serves") && said.contains(&scene.place.socket()), "{said}");
    scene.check_bystander();
    let newcomer = client_at(&scene.place);
    assert_eq!(newcomer.status().unwrap().pid, scene.broker.pid());
}

#[test]
fn the_socket_of_a_killed_broker_is_replaced() {
    let place = Place::new();
    let mut first = BrokerProcess::start(&place.socket(), &[]);
    first.kill();
    assert!(Path::new(&place.socket()).exists(), "a killed broker leaves its socket behind");
    let error = Client::connect(Some(&place.socket())).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionLost);
    assert!(error.to_string().contains(&place.socket()), "{error}");
    let second = BrokerProcess::start(&place.socket(), &[]);
    let client = client_at(&place);
    assert_eq!(client.status().unwrap().pid, second.pid());
}

#[test]
fn what_is_not_a_socket_is_left_alone() {
    let place = Place::new();
    std::fs::write(place.socket(), "precious").unwrap();
    let (code, said) = refused(serve_command(&place.socket(), &[]));
    assert_eq!(code, Some(2), "{said}");
    assert!(said.contains("is not a socket") && said.contains(&place.socket()), "{said}");
    assert_eq!(std::fs::read_to_string(place.socket()).unwrap(), "precious");
}

#[test]
fn the_socket_is_for_its_user_only() {
    let scene = Scene::new(&[]);
    let mode = std::fs::metadata(scene.place.socket()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

/// Whether this process may become another user; says so where it may not.
fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("skipped: only root can act as two users");
    }
    root
}

/// Lets every user reach what lies in the place's folder.
fn open_to_all(place: &Place) {
    let mode = |mode| std::fs::Permissions::from_mode(mode);
    std::fs::set_permissions(place.folder.path(), mode(0o777)).unwrap();
}

/// What `luna-broker status` of another user says.
fn status_as_nobody(socket: &str) -> (Option<i32>, String) {
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_luna-broker"));
    refused({
        command.args(["status", "--socket", socket]).uid(NOBODY).gid(NOBODY);
        command
    })
}

#[test]
fn another_users_process_is_kept_out_by_the_file_system_and_by_the_broker() {
    if !is_root() {
        return;
    }
    let scene = Scene::new(&[]);
    open_to_all(&scene.place);
    let (code, said) = status_as_nobody(&scene.place.socket());
    assert_eq!(code, Some(3), "{said}");
    assert!(said.contains(&scene.place.socket()), "{said}");
    // Even where somebody has opened the socket to all.
    std::fs::set_permissions(scene.place.socket(), std::fs::Permissions::from_mode(0o777)).unwrap();
    for _ in 0..10 {
        let (code, said) = status_as_nobody(&scene.place.socket());
        assert_eq!(code, Some(4), "{said}");
        assert!(said.contains("belongs to user 0") && said.contains("65534"), "{said}");
        assert!(said.contains("start a broker of your own"), "{said}");
    }
    let status = scene.bystander.status().unwrap();
    assert_eq!((status.sessions.len(), status.refused), (1, 10));
    scene.check_bystander();
}

#[test]
fn a_client_does_not_trust_another_users_broker() {
    if !is_root() {
        return;
    }
    let place = Place::new();
    open_to_all(&place);
    let mut command = serve_command(&place.socket(), &[]);
    command.uid(NOBODY).gid(NOBODY);
    let _stranger = BrokerProcess::launch(command).unwrap();
    let error = Client::connect(Some(&place.socket())).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Refused, "{error}");
    assert!(error.to_string().contains("belongs to user 65534, not to user 0"), "{error}");
}

#[test]
fn another_users_socket_file_is_not_replaced() {
    if !is_root() {
        return;
    }
    let place = Place::new();
    BrokerProcess::start(&place.socket(), &[]).kill();
    chown(place.socket(), Some(NOBODY), Some(NOBODY)).unwrap();
    let (code, said) = refused(serve_command(&place.socket(), &[]));
    assert_eq!(code, Some(4), "{said}");
    assert!(said.contains("65534") && said.contains(&place.socket()), "{said}");
    assert!(Path::new(&place.socket()).exists());
}

#[test]
fn a_refusal_reaches_the_client_however_the_two_are_scheduled() {
    // The broker hangs up right after its refusal, perhaps before the hello is written.
    let scene = Scene::new(&[]);
    for forced in std::iter::repeat_n(luna_broker::protocol::Rung::Local, 100) {
        let config = luna_broker::config::ClientConfig { rung: Some(forced), ..Default::default() };
        let error: Error = Client::connect_with(Some(&scene.place.socket()), config).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Refused, "{error}");
        assert!(error.to_string().contains("local") && !error.remedy().is_empty(), "{error}");
    }
    let latent = Latent::new(8, 8, 1.0);
    latent.check(&client_at(&scene.place).vae(HAND_OFF).unwrap().decode(latent.input()).unwrap()).unwrap();
}

#[test]
fn a_default_folder_that_others_could_change_is_refused_with_what_is_wrong_with_it() {
    let place = Place::new();
    let (open, link) = (place.file("open"), place.file("link"));
    std::fs::create_dir(&open).unwrap();
    std::os::unix::fs::symlink(&open, &link).unwrap();
    let serve = |folder: &Path| {
        let mut command = serve_command(&folder.join("luna-broker.sock").to_string_lossy(), &[]);
        command.env("XDG_RUNTIME_DIR", folder);
        command
    };
    std::fs::set_permissions(&open, std::fs::Permissions::from_mode(0o770)).unwrap();
    for (folder, defect) in [(&open, "other users can write to it"), (&link, "it is a link")] {
        let (code, said) = refused(serve(folder));
        assert_eq!(code, Some(2), "{said}");
        assert!(said.contains(&*folder.to_string_lossy()) && said.contains(defect), "{said}");
        assert!(said.contains("chmod 700") && said.contains("--socket"), "{said}");
    }
    std::fs::set_permissions(&open, std::fs::Permissions::from_mode(0o700)).unwrap();
    BrokerProcess::launch(serve(&open)).unwrap();
}
