use std::fmt::Write;

use luna_broker::protocol::{DeviceRung, ModelReport, Status};

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
    _ = writeln!(text, "\nlanes");
    let lanes: Vec<_> = status
        .lanes
        .iter()
        .map(|lane| {
            let service = format!("{:?}", lane.service).to_lowercase();
            let queued = format!("{} of {}", lane.queued, lane.capacity);
            [
                service,
                lane.device.clone(),
                queued,
                if lane.busy { "yes" } else { "no" }.to_owned(),
                lane.completed.to_string(),
            ]
        })
        .collect();
    text + &table(["service", "device", "waiting", "running", "completed"], &lanes)
}

/// `luna-broker models` for people.
pub(crate) fn models(models: &[ModelReport]) -> String {
    let rows: Vec<_> = models
        .iter()
        .map(|model| {
            let latent = format!("{} channels, 1:{}", model.latent_channels, model.ratio);
            let loaded = if model.loaded { "yes" } else { "no" }.to_owned();
            [model.name.clone(), model.family.clone(), latent, loaded, bytes(model.bytes), model.device.clone()]
        })
        .collect();
    table(["name", "family", "latent", "loaded", "weights", "device"], &rows)
}
