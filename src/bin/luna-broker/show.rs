use std::fmt::Write;

use luna_broker::protocol::{
    DeviceRung, EncoderReport, ModelReport, RunStatus, StackReport, Status, VerifyReport, WeightReport,
};
use luna_broker::service::RunReport;

/// A number of bytes as people read it.
pub(crate) fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = count as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{count} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

/// Rows under a header, columns as wide as their widest cell.
fn table<const N: usize>(header: [&str; N], rows: &[[String; N]]) -> String {
    let width = |column: usize| {
        rows.iter().map(|row| row[column].chars().count()).chain([header[column].chars().count()]).max().unwrap_or(0)
    };
    let widths: [usize; N] = std::array::from_fn(width);
    let line = |cells: [&str; N]| {
        let padded: Vec<String> = cells.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        format!("  {}\n", padded.join("  ").trim_end())
    };
    let mut text = line(header);
    for row in rows {
        text += &line(std::array::from_fn(|column| row[column].as_str()));
    }
    text
}

/// `luna-broker status` for people.
pub(crate) fn status(status: &Status) -> String {
    let mut text = String::new();
    // Writing to a string cannot fail.
    _ = writeln!(
        text,
        "luna-broker {} at {}, pid {}, up {:.0} s",
        status.version, status.address, status.pid, status.uptime_s
    );
    _ = writeln!(
        text,
        "{} requests answered, {} of them with a fault; {} connections refused, {} sessions lost",
        status.requests, status.faults, status.refused, status.sessions_lost
    );
    _ = writeln!(text, "\nsessions");
    let sessions: Vec<_> = status
        .sessions
        .iter()
        .map(|session| {
            let rungs: Vec<String> =
                session.rungs.iter().map(|rung| format!("{} {}", rung.device, rung.rung)).collect();
            let reasons: Vec<String> = session.rungs.iter().map(DeviceRung::why).collect();
            let leases = format!("{} ({})", session.leases, bytes(session.leased_bytes));
            let pid = session.pid.map_or_else(|| "?".to_owned(), |pid| pid.to_string());
            [session.name.clone(), pid, rungs.join(", "), reasons.join(", "), leases, session.requests.to_string()]
        })
        .collect();
    text += &table(["name", "pid", "rung", "why", "leases", "requests"], &sessions);
    _ = writeln!(text, "\nmodels");
    text += &models(&status.models);
    if !status.weights.is_empty() {
        _ = writeln!(text, "\nweights");
        text += &weights(&status.weights);
    }
    _ = writeln!(text, "\nlanes");
    let lanes: Vec<_> = status
        .lanes
        .iter()
        .map(|lane| {
            let permitted = lane.permitted.and_then(|id| status.sessions.iter().find(|session| session.id == id));
            let queued = format!("{} of {}", lane.queued, lane.capacity);
            [
                lane.service.name().to_owned(),
                lane.device.clone(),
                queued,
                match permitted {
                    Some(session) => format!("permit of {}", session.name),
                    None => if lane.busy { "yes" } else { "no" }.to_owned(),
                },
                lane.completed.to_string(),
                lane.batches.to_string(),
            ]
        })
        .collect();
    text += &table(["service", "device", "waiting", "running", "completed", "in batches"], &lanes);
    if !status.runs.is_empty() {
        _ = writeln!(text, "\nruns");
        text += &runs(status);
    }
    if !status.stacks.is_empty() {
        _ = writeln!(text, "\nadapters");
        text += &stacks(&status.stacks);
    }
    text
}

fn runs(status: &Status) -> String {
    let row = |run: &RunStatus| {
        let session = status.sessions.iter().find(|session| session.id == run.session);
        let RunReport { steps, hits, .. } = run.report;
        [
            session.map_or_else(|| run.session.to_string(), |session| session.name.clone()),
            run.model.clone(),
            run.adapters.to_string(),
            steps.to_string(),
            if run.cache.is_some() { format!("{hits} of {steps}") } else { "no cache".to_owned() },
            if run.cache.is_some() { format!("{:.2} x", run.speed_up) } else { String::new() },
        ]
    };
    let rows: Vec<_> = status.runs.iter().map(row).collect();
    table(["session", "model", "adapters", "steps", "left out", "speed-up"], &rows)
}

fn stacks(stacks: &[StackReport]) -> String {
    let row = |stack: &StackReport| {
        let adapters: Vec<String> =
            stack.adapters.iter().map(|used| format!("{} at {}", used.name, used.strength)).collect();
        let users = stack.users.to_string();
        let mode = if stack.merged { "auto, merged" } else { stack.mode.name() };
        [adapters.join(", "), stack.model.clone(), mode.to_owned(), bytes(stack.bytes), users]
    };
    let rows: Vec<_> = stacks.iter().map(row).collect();
    table(["stack", "model", "mode", "bytes", "users"], &rows)
}

fn weights(weights: &[WeightReport]) -> String {
    let rows: Vec<_> = weights
        .iter()
        .map(|set| {
            let name = set.names.first().cloned().unwrap_or_else(|| set.path.clone());
            let dtypes: Vec<&str> = set.dtypes.iter().map(|(name, _)| name.as_str()).collect();
            let holder = |holder: &luna_broker::protocol::HolderReport| {
                let diverged = holder.diverged_bytes.filter(|&diverged| diverged > 0);
                let diverged = diverged.map_or_else(String::new, |diverged| format!(" ({} diverged)", bytes(diverged)));
                format!("{}{diverged}", holder.name)
            };
            let holders: Vec<String> = set.holders.iter().map(holder).collect();
            [
                name,
                dtypes.join(", "),
                bytes(set.bytes),
                set.device.clone(),
                set.state.name().to_owned(),
                bytes(set.saved_bytes),
                holders.join(", "),
            ]
        })
        .collect();
    table(["name", "types", "bytes", "device", "state", "saved", "attached by"], &rows)
}

/// `luna-broker verify` for people.
pub(crate) fn verified(reports: &[VerifyReport]) -> String {
    let rows: Vec<_> = reports
        .iter()
        .map(|report| {
            let verdict = if report.found == report.expected { "as it was" } else { "CHANGED" };
            let digest = report.found.to_string().chars().take(16).collect();
            [report.name.clone(), report.device.clone(), bytes(report.bytes), digest, verdict.to_owned()]
        })
        .collect();
    table(["name", "device", "bytes", "content", "verdict"], &rows)
}

/// `luna-broker models` for people.
pub(crate) fn models(models: &[ModelReport]) -> String {
    let rows: Vec<_> = models
        .iter()
        .map(|model| {
            let takes = match (&model.unet, &model.clip) {
                (Some(unet), _) => format!("{} channels in, {}, {}", unet.in_channels, unet.variant, unet.prediction),
                (None, Some(clip)) => {
                    let encoder = |one: &EncoderReport| format!("{} {} wide", one.kind, one.width);
                    clip.encoders.iter().map(encoder).collect::<Vec<_>>().join(", ")
                }
                (None, None) if model.registered_by.is_some() => String::new(),
                (None, None) => format!("{} channels, 1:{}", model.latent_channels, model.ratio),
            };
            let loaded = match model.registered_by {
                Some(session) => format!("by session {session}"),
                None => if model.loaded { "yes" } else { "no" }.to_owned(),
            };
            let (name, service, family) = (model.name.clone(), model.service.name().to_owned(), model.family.clone());
            let used = match model.idle_s {
                None => "now".to_owned(),
                Some(idle) if model.loaded => format!("{idle:.0} s ago"),
                Some(_) => String::new(),
            };
            let users = model.users.to_string();
            [name, service, family, takes, loaded, bytes(model.bytes), model.device.clone(), users, used]
        })
        .collect();
    table(["name", "service", "family", "takes", "loaded", "weights", "device", "users", "used"], &rows)
}

/// A model that was loaded.
pub(crate) fn loaded(model: &ModelReport) -> String {
    let ModelReport { name, service, family, bytes: size, .. } = model;
    format!("{name} ({}, {family}, {} of weights)", service.name(), bytes(*size))
}
