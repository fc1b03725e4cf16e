use std::fmt;

use serde::Serialize;

use crate::error::{Error, ErrorKind};

/// How a check came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// As it should be.
    Ok,
    /// Work goes on, but something is missing, slower, or good to know.
    Note,
    /// Something does not work.
    Fail,
}

impl Verdict {
    /// The name in output.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Note => "note",
            Self::Fail => "fail",
        }
    }
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What was looked at.
    pub check: String,
    /// How it came out.
    pub verdict: Verdict,
    /// What was found.
    pub found: String,
    /// What to do about it; empty where there is nothing to do.
    pub remedy: String,
}

impl Finding {
    pub(super) fn ok(check: impl Into<String>, found: impl Into<String>) -> Self {
        Self { check: check.into(), verdict: Verdict::Ok, found: found.into(), remedy: String::new() }
    }

    pub(super) fn note(check: impl Into<String>, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { check: check.into(), verdict: Verdict::Note, found: found.into(), remedy: remedy.into() }
    }

    pub(super) fn fail(check: impl Into<String>, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { check: check.into(), verdict: Verdict::Fail, found: found.into(), remedy: remedy.into() }
    }

    pub(super) fn failed(check: impl Into<String>, error: &Error) -> Self {
        Self::fail(check, error.message(), error.remedy())
    }
}

/// Everything that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Diagnosis {
    /// One finding for each thing, in the order in which they were looked at.
    pub findings: Vec<Finding>,
    /// What keeps a client in this process from working; `None` where it works, by bytes in frames at least.
    pub obstacle: Option<ErrorKind>,
}

impl Diagnosis {
    /// 0 where a client in this process could work, else the exit code of what keeps it from it.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        self.obstacle.map_or(0, ErrorKind::exit_code)
    }
}

/// For people: a line for each finding, a remedy below its finding.
impl fmt::Display for Diagnosis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.findings.iter().map(|finding| finding.check.chars().count()).max().unwrap_or(0);
        for Finding { check, verdict, found, remedy } in &self.findings {
            writeln!(f, "{check:<width$}  {:<4}  {found}", verdict.name())?;
            if !remedy.is_empty() {
                writeln!(f, "{:width$}        remedy: {remedy}", "")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_remedy_stands_below_its_finding_and_columns_line_up() {
        let findings = vec![
            Finding::ok("driver", "CUDA 13.0, 1 GPU"),
            Finding::note("this process -> cpu", "inline: bytes", "mount /dev/shm"),
        ];
        let text = Diagnosis { findings, obstacle: None }.to_string();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "driver               ok    CUDA 13.0, 1 GPU");
        assert_eq!(lines[1], "this process -> cpu  note  inline: bytes");
        assert_eq!(lines[2].trim_start(), "remedy: mount /dev/shm");
        assert_eq!(lines[2].find("remedy"), lines[1].find("inline"));
        assert_eq!(lines.len(), 3);
    }

    #[test]
    fn the_exit_code_is_that_of_the_obstacle() {
        let with = |obstacle| Diagnosis { findings: Vec::new(), obstacle }.exit_code();
        assert_eq!(with(None), 0);
        assert_eq!(with(Some(ErrorKind::ConnectionLost)), 3);
        assert_eq!(with(Some(ErrorKind::Refused)), 4);
        assert_eq!(with(Some(ErrorKind::Timeout)), 6);
    }

    #[test]
    fn findings_are_json_with_four_fields() {
        let json = serde_json::to_value(Finding::note("mps", "off", "start it")).unwrap();
        assert_eq!(json, serde_json::json!({"check": "mps", "verdict": "note", "found": "off", "remedy": "start it"}));
    }
}
