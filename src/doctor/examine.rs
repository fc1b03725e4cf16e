use std::sync::mpsc;
use std::time::Duration;

use super::broker::{self, Reached};
use super::finding::{Diagnosis, Finding, Verdict};
use super::gpu::{self, Driven, GpuFacts};
use super::rung::{self, Circumstances};
use super::system::System;
use super::{driver, platform};
use crate::client::{Client, address_from_environment};
use crate::config::{ClientConfig, rung_from_environment};
use crate::error::{Error, ErrorKind};

/// How long a step may take unless the caller says otherwise: a driver with many GPUs starts slowly.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Looks at the driver, the GPUs, the broker at `address` (`None`: where a client would connect) and how tensors cross to
/// it. Makes a context on each GPU, for as long as it takes. No step takes longer than `patience`.
#[must_use]
pub fn examine(address: Option<&str>, patience: Duration) -> Diagnosis {
    let address = address.map_or_else(address_from_environment, str::to_owned);
    let mut examination = Examination { system: System::of_this_machine(), patience, diagnosis: Diagnosis::default() };
    examination.add([platform::build()]);
    examination.add(platform::surroundings(&examination.system));
    let gpus = examination.driver();
    examination.broker(&address, &gpus);
    examination.add(platform::mps(&examination.system, !gpus.is_empty()));
    let findings = &examination.diagnosis.findings;
    let falls_short = findings.iter().any(|finding| finding.verdict != Verdict::Ok && is_shared(finding));
    examination.add(platform::container(&examination.system, falls_short));
    examination.diagnosis
}

/// Whether a finding is about what another container may keep from this one.
fn is_shared(finding: &Finding) -> bool {
    ["broker", "namespace"].contains(&finding.check.as_str()) || finding.check.starts_with(&rung::check(""))
}

struct Examination {
    system: System,
    patience: Duration,
    diagnosis: Diagnosis,
}

impl Examination {
    fn add(&mut self, findings: impl IntoIterator<Item = Finding>) {
        self.diagnosis.findings.extend(findings);
    }

    /// The driver; the GPUs that can be used.
    fn driver(&mut self) -> Vec<GpuFacts> {
        match within(self.patience, "the CUDA driver", driver::look) {
            Ok(driver) => {
                self.add(gpu::findings(&driver, &self.system));
                driver.map_or_else(|_| Vec::new(), |Driven { gpus, .. }| gpus)
            }
            Err(error) => {
                self.add([Finding::failed("driver", &error)]);
                Vec::new()
            }
        }
    }

    /// The broker, and how tensors cross to it.
    fn broker(&mut self, address: &str, gpus: &[GpuFacts]) {
        match self.reach(address) {
            Ok(reached) => {
                self.add(broker::answered(&reached, address));
                self.rungs(&reached, gpus);
            }
            Err(error) => {
                self.add([Finding::failed("broker", &error)]);
                self.diagnosis.obstacle = Some(error.kind());
            }
        }
    }

    fn reach(&self, address: &str) -> Result<Reached, Error> {
        let config = ClientConfig {
            name: format!("doctor-{}", std::process::id()),
            timeout: Some(self.patience),
            connect_timeout: self.patience,
            rung: rung_from_environment()?,
            ..ClientConfig::default()
        };
        let what = format!("the broker at {address}");
        let address = address.to_owned();
        within(self.patience, &what, move || broker::reach(&address, config))?
    }

    fn rungs(&mut self, reached: &Reached, gpus: &[GpuFacts]) {
        let others = broker::other_namespaces(&self.system, reached.peer, reached.status.pid);
        self.add(others.as_deref().map(broker::namespaces));
        let brokers_gpu = broker::brokers_gpu(&reached.status);
        let circumstances = Circumstances {
            is_wsl: self.system.is_wsl(),
            other_namespaces: others.unwrap_or_default(),
            sees_brokers_gpu: gpus.iter().any(|gpu| Some(gpu.uuid.to_string()) == brokers_gpu),
            brokers_gpu,
        };
        self.add(reached.session.rungs.iter().map(rung::host));
        for gpu in gpus {
            let finding = self.gpu_rung(&reached.client, gpu, &circumstances);
            self.add([finding]);
        }
    }

    fn gpu_rung(&self, client: &Client, gpu: &GpuFacts, circumstances: &Circumstances) -> Finding {
        let (client, name) = (client.clone(), gpu.uuid.to_string());
        let asked = name.clone();
        let opened = within(self.patience, &format!("the probe of {name}"), move || client.prepare_gpu(&asked));
        match opened.and_then(|opened| opened) {
            Ok(rung) => rung::gpu(&rung, gpu, circumstances),
            Err(error) => Finding::failed(rung::check(&name), &error),
        }
    }
}

/// Runs `step` on a thread of its own, which is left behind where it does not come back: drivers and dead peers hang
/// where no time limit reaches them.
fn within<T: Send + 'static>(
    patience: Duration,
    what: &str,
    step: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Error> {
    let (done, outcome) = mpsc::channel();
    let run = move || {
        // Nobody waits any more where the answer is late.
        _ = done.send(step());
    };
    let started = std::thread::Builder::new().name("luna-doctor".to_owned()).spawn(run);
    if let Err(cause) = started {
        return Err(Error::new(
            ErrorKind::Io,
            format!("no thread can be started: {cause}"),
            "raise the limit of threads",
        ));
    }
    outcome.recv_timeout(patience).map_err(|error| match error {
        mpsc::RecvTimeoutError::Timeout => Error::new(
            ErrorKind::Timeout,
            format!("{what} did not answer within {:.0} s", patience.as_secs_f64()),
            "try again with more time; if it stays so, end the process that hangs, or restart the machine",
        ),
        mpsc::RecvTimeoutError::Disconnected => {
            Error::new(ErrorKind::Internal, format!("looking at {what} panicked"), "report it, with what was printed")
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_that_hangs_is_left_behind_and_one_that_panics_is_told() {
        assert_eq!(within(Duration::from_secs(30), "it", || 7).unwrap(), 7);
        let (_keep, never) = mpsc::channel::<()>();
        let late = within(Duration::from_millis(20), "the driver", move || never.recv()).unwrap_err();
        assert_eq!(late.kind(), ErrorKind::Timeout);
        assert!(late.message().contains("the driver did not answer"), "{late}");
        let panicked = within::<()>(Duration::from_secs(30), "it", || panic!("for the test")).unwrap_err();
        assert_eq!(panicked.kind(), ErrorKind::Internal);
    }

    #[test]
    fn a_socket_that_is_not_there_is_the_obstacle() {
        let folder = tempfile::tempdir().unwrap();
        let address = folder.path().join("none.sock").to_string_lossy().into_owned();
        let diagnosis = examine(Some(&address), Duration::from_secs(30));
        assert_eq!(diagnosis.obstacle, Some(ErrorKind::ConnectionLost));
        assert_eq!(diagnosis.exit_code(), 3);
        let broker = diagnosis.findings.iter().find(|finding| finding.check == "broker").unwrap();
        assert!(broker.found.contains(&address) && broker.verdict == Verdict::Fail, "{broker:?}");
    }
}
