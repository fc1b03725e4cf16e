//! The client process's side: what it can be told to do.

use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use luna_broker::client::{Client, Tensor};
use luna_broker::config::ClientConfig;
use luna_broker::{Error, ErrorKind};

use crate::process::{answer, obey_commands};
use crate::raw::Raw;
use crate::support::{HAND_OFF, Latent, eventually};

/// What a client process has so far.
#[derive(Default)]
struct Holdings {
    socket: Option<UnixStream>,
    welcomed: Option<Raw>,
    client: Option<Client>,
    tensors: Vec<Tensor>,
}

pub(crate) fn run() {
    let mut held = Holdings::default();
    obey_commands(|socket, words| match held.obey(socket, words) {
        Ok(text) => text,
        Err(error) => format!("error {:?} {error}", error.kind()),
    });
}

impl Holdings {
    fn obey(&mut self, socket: &str, words: &[&str]) -> Result<String, Error> {
        match *words {
            ["socket"] => self.socket = Some(UnixStream::connect(socket).expect("the broker listens")),
            ["hello"] => self.welcomed = Some(Raw::welcomed(socket).0),
            ["connect"] => self.client = Some(connect(socket)?),
            ["hold", count] => self.hold(count.parse().expect("a number"))?,
            ["storm"] => ride_out(self.client(), || answer("healthy"))?,
            #[cfg(feature = "torch")]
            ["endless", model] => {
                let vae = self.client().vae(model)?;
                vae.decode(crate::tiny::Batch::endless().input())?;
            }
            _ => panic!("{words:?} is no command"),
        }
        Ok("done".to_owned())
    }

    fn client(&self) -> &Client {
        self.client.as_ref().expect("connected before")
    }

    fn hold(&mut self, count: u64) -> Result<(), Error> {
        let vae = self.client().vae(HAND_OFF)?;
        for at in 0..count {
            self.tensors.push(vae.decode(Latent::new(16, 16, at as f32).input())?);
        }
        Ok(())
    }
}

fn connect(socket: &str) -> Result<Client, Error> {
    let config = ClientConfig { name: "victim".to_owned(), ..ClientConfig::default() };
    Client::connect_with(Some(socket), config)
}

/// Calls without a pause while the broker is healthy, gone and back. Each call must end within a second, in the right
/// answer or an error that says the broker is gone; and calls must work again.
pub(crate) fn ride_out(client: &Client, healthy: impl FnOnce()) -> Result<(), Error> {
    const ENOUGH: usize = 50;
    let vae = client.vae(HAND_OFF)?;
    let kept_latent = Latent::new(32, 32, 5.0);
    let kept = vae.decode(kept_latent.input())?;
    let (mut before, mut after, mut lost) = (0usize, 0usize, false);
    let mut healthy = Some(healthy);
    let epoch = client.session().epoch;
    eventually("a recovery from the broker's death", || {
        let latent = Latent::new(8 + before as u64 % 5, 16, (before + after) as f32);
        let started = Instant::now();
        let decoded = vae.decode(latent.input());
        let took = started.elapsed();
        assert!(took < Duration::from_secs(1), "a call took {took:?}: {decoded:?}");
        match decoded {
            Ok(image) => {
                latent.check(&image).unwrap();
                // A restart quicker than a call is seen only by the new epoch.
                if lost || client.session().epoch != epoch { after += 1 } else { before += 1 }
            }
            Err(error) => {
                let typed = matches!(error.kind(), ErrorKind::ConnectionLost | ErrorKind::ShuttingDown);
                assert!(typed, "{:?}: {error}", error.kind());
                assert!(!error.remedy().is_empty() || error.to_string().contains("no broker answers"), "{error}");
                lost = true;
            }
        }
        if before == ENOUGH
            && let Some(healthy) = healthy.take()
        {
            healthy();
        }
        after == ENOUGH
    });
    // The broker that made it is dead; the memory is the client's as long as it holds it.
    kept_latent.check(&kept).unwrap();
    Ok(())
}
