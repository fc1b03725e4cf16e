//! The client process's side: what it can be told to do, and how tests tell it.

use std::time::Duration;

use luna_broker::client::{AttachOptions, CallOptions, Client, Permit, Tensor, Weights};
use luna_broker::config::ClientConfig;
use luna_broker::service::Service;
use luna_broker::tensor::{CastRule, DType};
use luna_broker::{Error, ErrorKind};

use crate::file::{first, publish};
use crate::process::{ClientProcess, obey_commands};
use crate::scene::Scene;

/// What a client process has so far.
#[derive(Default)]
struct Holdings {
    client: Option<Client>,
    weights: Option<Weights>,
    tensors: Vec<Tensor>,
    permit: Option<Permit>,
}

/// A client process called `name`, connected.
pub(crate) fn worker(scene: &Scene, name: &str) -> ClientProcess {
    let mut worker = ClientProcess::start(&scene.place.socket());
    assert_eq!(worker.ask(&format!("connect {name}")), "done");
    worker
}

/// As [`worker`], with the file at `path` attached.
pub(crate) fn holder(scene: &Scene, name: &str, path: &str) -> ClientProcess {
    let mut holder = worker(scene, name);
    assert_eq!(holder.ask(&format!("attach {path}")), "done");
    holder
}

/// What an answer is that an error of this kind gives.
pub(crate) fn is(answer: &str, kind: ErrorKind) -> bool {
    answer.starts_with(&format!("error {kind:?} "))
}

pub(crate) fn run() {
    let mut held = Holdings::default();
    obey_commands(|socket, words| match held.obey(socket, words) {
        Ok(text) => text,
        Err(error) => format!("error {:?} {error} ({})", error.kind(), error.remedy()),
    });
}

impl Holdings {
    fn obey(&mut self, socket: &str, words: &[&str]) -> Result<String, Error> {
        match *words {
            ["enter", folder] => std::env::set_current_dir(folder).expect("there is such a folder"),
            ["digest"] => crate::publishing::digest_without_threads(),
            ["connect", name] => {
                let config = ClientConfig { name: name.to_owned(), ..ClientConfig::default() };
                self.client = Some(Client::connect_with(Some(socket), config)?);
            }
            ["attach", path] => self.weights = Some(self.client().attach(path)?),
            ["half", name] => {
                let options = AttachOptions { rule: CastRule::all(DType::F16), ..AttachOptions::default() };
                self.weights = Some(self.client().attach_with(name, &options)?);
            }
            ["publish", name, start] => {
                let start = start.parse().expect("a number");
                self.weights = Some(publish(self.client(), name, start, 5000)?);
            }
            ["keep", key] => self.tensors.push(self.weights().tensor(key)?),
            ["drop"] => self.weights = None,
            ["forget"] => self.tensors.clear(),
            ["leave"] => self.client = None,
            ["close"] => self.client().close(),
            ["check"] => self.weights().check()?,
            ["reattach"] => self.weights().reattach()?,
            ["first", key] => return Ok(first(self.weights(), key).to_string()),
            ["kept"] => return Ok(self.tensors[0].values::<f32>()?[0].to_string()),
            ["address", key] => return Ok(format!("{:?}", self.weights().tensor(key)?.address())),
            ["write", key, value] => stray(&self.weights().tensor(key)?, value.parse().expect("a number")),
            ["mapped"] => return Ok(mapped()),
            ["permit", bytes] => self.permit(bytes.parse().expect("a number"), None)?,
            ["hurry"] => self.permit(1, Some(Duration::from_millis(200)))?,
            ["release"] => self.permit = None,
            ["fork"] => return Ok(crate::forked::in_a_child(|| self.refuse_as_a_child())),
            ["churn", path, seed] => self.churn(path, seed.parse().expect("a number"))?,
            _ => panic!("{words:?} is no command"),
        }
        Ok("done".to_owned())
    }

    /// What the parent has is refused to its child, and dropping it means nothing.
    fn refuse_as_a_child(&mut self) {
        let client = self.client().clone();
        let calls = [
            ("ping", client.ping().map(|_| ())),
            ("attach", client.attach(self.weights().name()).map(|_| ())),
            ("publish", publish(&client, "child", 1.0, 5000).map(|_| ())),
            ("unload", client.unload(self.weights().name())),
            ("check", self.weights().check()),
            ("reattach", self.weights().reattach()),
        ];
        for (call, made) in calls {
            let error = made.expect_err(call);
            assert_eq!(error.kind(), ErrorKind::ConnectionLost, "{call}: {error}");
            assert!(error.message().contains("forked") && !error.remedy().is_empty(), "{call}: {error}");
        }
        assert_eq!(first(self.weights(), "t0"), 0.0, "what was attached stays readable");
        client.close();
        drop(client);
        *self = Self::default();
    }

    fn client(&self) -> &Client {
        self.client.as_ref().expect("connected before")
    }

    fn weights(&self) -> &Weights {
        self.weights.as_ref().expect("attached before")
    }

    fn permit(&mut self, bytes: u64, timeout: Option<Duration>) -> Result<(), Error> {
        let options = CallOptions { timeout, ..CallOptions::default() };
        self.permit = Some(self.client().permit(Service::Vae, bytes, &options)?);
        Ok(())
    }

    /// Attaches, publishes and gives back, until the process is killed; what others do at the same time to the same
    /// names may be in its way.
    fn churn(&mut self, path: &str, seed: u64) -> Result<(), Error> {
        for round in seed.. {
            self.weights = Some(self.client().attach(path)?);
            let start = (round % 5) as f32;
            match publish(self.client(), &format!("published-{}", round % 3), start, 5000) {
                Ok(weights) => assert_eq!(first(&weights, "t0"), start),
                Err(error) => assert!(matches!(error.kind(), ErrorKind::InUse | ErrorKind::Stale), "{error}"),
            }
            if round == seed + 100 {
                crate::process::answer("warm");
            }
        }
        Ok(())
    }
}

/// Writes to attached memory, as a faulty node of somebody's workflow does.
fn stray(tensor: &Tensor, value: f32) {
    let address = tensor.address().expect("it is in memory");
    let elements = std::ptr::with_exposed_provenance_mut::<f32>(address);
    // SAFETY: the tensor has at least one element, which lies there in memory that is mapped for writing; this thread is
    // the only one of the process that uses it.
    unsafe { elements.write_volatile(value) };
}

/// The mappings of weights in this process: how many, and of which memory.
fn mapped() -> String {
    let maps = std::fs::read_to_string("/proc/self/maps").expect("readable");
    let weights = maps.lines().filter(|line| line.contains("memfd:luna-broker-weights"));
    let inodes: Vec<&str> = weights.filter_map(|line| line.split_whitespace().nth(4)).collect();
    inodes.join(",")
}
