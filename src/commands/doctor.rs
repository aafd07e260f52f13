//! The command `doctor`: what this program and this machine have, and what to do about the rest.
//!
//! Nothing here goes through a backend: each library is looked for at run time by its own name, so
//! the command says what is missing on a machine where the backends could not even start.

mod cuda;
mod host;
mod vulkan;

use std::fmt::Write as _;

use clap::Args;
use serde::Serialize;

use super::{device, print, print_json};
use crate::config::{DeviceConfig, DeviceKind};
use crate::error::{Error, Result};

/// Arguments of `doctor`.
#[derive(Clone, Debug, Args)]
pub struct DoctorArgs {
    /// Fail unless this device can be used: auto, cpu, cuda, wgpu, with an index as in cuda:1
    #[arg(long, value_name = "DEVICE", value_parser = device)]
    pub device: Option<DeviceConfig>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Runs the command.
///
/// # Errors
///
/// [`Error::Device`] if the device that was asked for cannot be used.
pub fn run(args: &DoctorArgs) -> Result<()> {
    let report = Report::new(Compiled::here());
    if args.json {
        print_json(&report)?;
    } else {
        print(&report.text())?;
    }
    match &args.device {
        Some(device) => report.require(device),
        None => Ok(()),
    }
}

/// Which backends are in this program.
#[derive(Clone, Copy, Debug, Serialize)]
struct Compiled {
    flex: bool,
    wgpu: bool,
    cuda: bool,
}

impl Compiled {
    fn here() -> Self {
        Self {
            flex: cfg!(feature = "flex"),
            wgpu: cfg!(feature = "wgpu"),
            cuda: cfg!(feature = "cuda"),
        }
    }
}

/// How a check came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum State {
    /// It is there and good.
    Ok,
    /// It is not there, and nothing that is in use needs it.
    Absent,
    /// It is missing or wrong, and something needs it.
    Problem,
}

/// One thing looked at.
#[derive(Clone, Debug, Serialize)]
struct Check {
    name: String,
    state: State,
    found: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    hint: Option<String>,
}

impl Check {
    fn ok(name: &str, found: impl Into<String>) -> Self {
        Self {
            name: name.to_owned(),
            state: State::Ok,
            found: found.into(),
            hint: None,
        }
    }

    /// A check that failed, which is a problem only if it is needed.
    fn failed(needed: bool, name: &str, found: impl Into<String>, hint: impl Into<String>) -> Self {
        Self {
            name: name.to_owned(),
            state: if needed {
                State::Problem
            } else {
                State::Absent
            },
            found: found.into(),
            hint: Some(hint.into()),
        }
    }
}

/// A device, whether or not this program can use it.
#[derive(Clone, Debug, Serialize)]
struct Device {
    /// As in a config: `cuda:0`.
    device: String,
    name: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    memory_total: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    memory_free: Option<u64>,
    /// Why it cannot be used; absent if it can.
    #[serde(skip_serializing_if = "Option::is_none")]
    unusable: Option<String>,
}

/// Everything found.
#[derive(Debug, Serialize)]
struct Report {
    version: &'static str,
    backends: Compiled,
    devices: Vec<Device>,
    checks: Vec<Check>,
}

impl Report {
    fn new(backends: Compiled) -> Self {
        let cuda = cuda::Cuda::look();
        let vulkan = vulkan::look();
        let mut devices = vec![host::device(backends.flex)];
        devices.extend(cuda.devices(backends.cuda));
        devices.extend(vulkan.devices(backends.wgpu));
        let mut checks = vec![
            backend_check("cpu", "flex", backends.flex),
            backend_check("cuda", "cuda", backends.cuda),
            backend_check("wgpu", "wgpu", backends.wgpu),
        ];
        checks.extend(cuda.checks(backends.cuda));
        checks.push(vulkan.check(backends.wgpu));
        checks.extend(host::checks());
        Self {
            version: env!("CARGO_PKG_VERSION"),
            backends,
            devices,
            checks,
        }
    }

    /// Whether the device can be used.
    fn require(&self, wanted: &DeviceConfig) -> Result<()> {
        let label = match wanted.kind {
            DeviceKind::Auto | DeviceKind::Cpu => wanted.kind.name().to_owned(),
            kind => format!("{kind}:{}", wanted.index),
        };
        let mut matching = self
            .devices
            .iter()
            .filter(|it| wanted.kind == DeviceKind::Auto || it.device == label)
            .peekable();
        let reason = match matching.peek() {
            None => "no such device was found".to_owned(),
            Some(first) => {
                let reason = first.unusable.clone().unwrap_or_default();
                if matching.any(|it| it.unusable.is_none()) {
                    return Ok(());
                }
                reason
            }
        };
        Err(Error::Device {
            device: label,
            reason,
            hint: "the hints of `mambabyte doctor` say what to install or rebuild".to_owned(),
        })
    }

    fn text(&self) -> String {
        let mut text = format!("mambabyte {}\n\ndevices\n", self.version);
        for device in &self.devices {
            let _ = write!(text, "  {:<8}  {}", device.device, device.name);
            match (device.memory_free, device.memory_total) {
                (Some(free), Some(total)) => {
                    let _ = write!(text, ", {} of {} free", gib(free), gib(total));
                }
                (None, Some(total)) => {
                    let _ = write!(text, ", {}", gib(total));
                }
                _ => {}
            }
            match &device.unusable {
                Some(reason) => {
                    let _ = writeln!(text, "\n            not usable: {reason}");
                }
                None => text.push('\n'),
            }
        }
        text.push_str("\nchecks\n");
        for check in &self.checks {
            let state = match check.state {
                State::Ok => "ok",
                State::Absent => "absent",
                State::Problem => "PROBLEM",
            };
            let _ = writeln!(text, "  {state:<8}  {}: {}", check.name, check.found);
            if let Some(hint) = &check.hint {
                let _ = writeln!(text, "            hint: {hint}");
            }
        }
        text
    }
}

fn backend_check(name: &str, feature: &str, compiled: bool) -> Check {
    let title = format!("backend {name}");
    if compiled {
        Check::ok(&title, "in this program")
    } else {
        let hint = format!("build with `--features {feature}` if you need it");
        Check::failed(false, &title, "not in this program", hint)
    }
}

/// Bytes in GiB with one decimal.
fn gib(bytes: u64) -> String {
    format!("{:.1} GiB", bytes as f64 / (1u64 << 30) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(devices: &[(&str, Option<&str>)]) -> Report {
        let device = |(device, unusable): &(&str, Option<&str>)| Device {
            device: (*device).to_owned(),
            name: "a device".to_owned(),
            memory_total: Some(24 << 30),
            memory_free: Some(23 << 30),
            unusable: unusable.map(str::to_owned),
        };
        Report {
            version: "0.0.0",
            backends: Compiled {
                flex: true,
                wgpu: false,
                cuda: true,
            },
            devices: devices.iter().map(device).collect(),
            checks: vec![
                Check::ok("one", "there"),
                Check::failed(true, "two", "not there", "install it"),
            ],
        }
    }

    fn require(report: &Report, wanted: &str) -> Result<()> {
        report.require(&device(wanted).expect("a device"))
    }

    #[test]
    fn this_machine_is_described_without_a_panic() {
        for all in [false, true] {
            let report = Report::new(Compiled {
                flex: all,
                wgpu: all,
                cuda: all,
            });
            assert!(report.text().contains("cpu"), "{}", report.text());
            assert!(serde_json::to_value(&report).is_ok());
            assert_eq!(require(&report, "cpu").is_ok(), all);
        }
    }

    #[test]
    fn a_device_is_required_by_name() {
        let report = report(&[
            ("cpu", None),
            ("cuda:0", Some("no NVRTC")),
            ("cuda:1", None),
        ]);
        for good in ["auto", "cpu", "cuda:1"] {
            assert!(require(&report, good).is_ok(), "{good}");
        }
        let error = require(&report, "cuda").expect_err("it has no NVRTC");
        assert_eq!(error.exit_code(), 5);
        assert!(
            error.report().contains("`cuda:0`: no NVRTC"),
            "{}",
            error.report()
        );
        let error = require(&report, "wgpu").expect_err("there is none");
        assert!(
            error.report().contains("`wgpu:0`: no such device"),
            "{}",
            error.report()
        );
    }

    #[test]
    fn auto_takes_any_usable_device() {
        let none = report(&[("cpu", Some("not built in")), ("cuda:0", Some("x"))]);
        assert!(require(&none, "auto").is_err());
        let last = report(&[("cpu", Some("not built in")), ("wgpu:0", None)]);
        assert!(require(&last, "auto").is_ok());
    }

    #[test]
    fn the_text_has_a_hint_for_every_problem() {
        let text = report(&[("cuda:0", None)]).text();
        assert!(
            text.contains("cuda:0    a device, 23.0 GiB of 24.0 GiB free"),
            "{text}"
        );
        assert!(
            text.contains("PROBLEM   two: not there\n            hint: install it"),
            "{text}"
        );
    }
}
