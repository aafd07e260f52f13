//! Processor, memory and disks.

use std::fs;
use std::path::Path;
use std::thread;

use super::{Check, Device, gib};

/// Less free space than this is worth a word: a checkpoint of the 353M model has 4.2 GB.
const LITTLE_DISK: u64 = 10 << 30;

/// The processor as a device.
pub(super) fn device(compiled: bool) -> Device {
    let memory = memory();
    Device {
        device: "cpu".to_owned(),
        name: format!("{} core(s), {}", cores(), simd().join(" ")),
        memory_total: memory.map(|it| it.total),
        memory_free: memory.map(|it| it.free),
        unusable: (!compiled)
            .then(|| "this program was built without the feature `flex`".to_owned()),
    }
}

/// The checks that no backend needs.
pub(super) fn checks() -> Vec<Check> {
    ["checkpoints", "data"]
        .map(disk)
        .into_iter()
        .flatten()
        .collect()
}

fn cores() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

/// Instruction sets that make a difference here.
fn simd() -> Vec<&'static str> {
    #[cfg(target_arch = "x86_64")]
    let all = [
        ("avx2", is_x86_feature_detected!("avx2")),
        ("fma", is_x86_feature_detected!("fma")),
        ("avx512f", is_x86_feature_detected!("avx512f")),
    ];
    #[cfg(target_arch = "aarch64")]
    let all = [("neon", std::arch::is_aarch64_feature_detected!("neon"))];
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let all: [(&'static str, bool); 0] = [];
    let found: Vec<_> = all
        .into_iter()
        .filter_map(|(name, there)| there.then_some(name))
        .collect();
    if found.is_empty() {
        vec!["no wide SIMD"]
    } else {
        found
    }
}

/// Memory in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Memory {
    total: u64,
    free: u64,
}

/// What is there for this process: the machine's memory, or its container's if that is less.
fn memory() -> Option<Memory> {
    let machine = parse_meminfo(&fs::read_to_string("/proc/meminfo").ok()?)?;
    let read = |name: &str| fs::read_to_string(format!("/sys/fs/cgroup/{name}")).ok();
    let container = parse_cgroup(
        &read("memory.max").unwrap_or_default(),
        &read("memory.current").unwrap_or_default(),
        &read("memory.stat").unwrap_or_default(),
    );
    Some(match container {
        Some(container) => Memory {
            total: machine.total.min(container.total),
            free: machine.free.min(container.free),
        },
        None => machine,
    })
}

fn parse_meminfo(text: &str) -> Option<Memory> {
    let kib = |key: &str| -> Option<u64> {
        let rest = text.lines().find_map(|line| line.strip_prefix(key))?;
        rest.trim().strip_suffix("kB")?.trim().parse().ok()
    };
    Some(Memory {
        total: kib("MemTotal:")?.saturating_mul(1024),
        free: kib("MemAvailable:")?.saturating_mul(1024),
    })
}

/// A container's limit; file pages that can be dropped count as free.
fn parse_cgroup(max: &str, current: &str, stat: &str) -> Option<Memory> {
    let total: u64 = max.trim().parse().ok()?;
    let used: u64 = current.trim().parse().ok()?;
    let cached: u64 = stat
        .lines()
        .find_map(|line| line.strip_prefix("inactive_file "))
        .and_then(|number| number.trim().parse().ok())
        .unwrap_or(0);
    Some(Memory {
        total,
        free: total.saturating_sub(used.saturating_sub(cached)),
    })
}

/// Free space where the folder `name` is or would be.
fn disk(name: &'static str) -> Option<Check> {
    let folder = Path::new(name);
    let there = if folder.exists() {
        folder
    } else {
        Path::new(".")
    };
    let free = free_space(there)?;
    let title = format!("disk for {name}/");
    let found = format!("{} free", gib(free));
    Some(if free >= LITTLE_DISK {
        Check::ok(&title, found)
    } else {
        let hint = "a checkpoint has 12 bytes a parameter, PG-19 has 11.7 GB; free some space";
        Check::failed(false, &title, found, hint)
    })
}

#[cfg(unix)]
fn free_space(folder: &Path) -> Option<u64> {
    let found = rustix::fs::statvfs(folder).ok()?;
    Some(found.f_bavail.saturating_mul(found.f_frsize))
}

#[cfg(not(unix))]
fn free_space(_folder: &Path) -> Option<u64> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_has_something() {
        assert!(cores() >= 1);
        assert!(!simd().is_empty());
        assert_eq!(device(true).unusable, None);
        assert!(device(false).unusable.is_some());
    }

    #[test]
    fn meminfo_is_read_in_kibibytes() {
        let text = "MemTotal:       8000 kB\nMemFree: 1 kB\nMemAvailable:   4000 kB\n";
        let expected = Memory {
            total: 8000 << 10,
            free: 4000 << 10,
        };
        assert_eq!(parse_meminfo(text), Some(expected));
        assert_eq!(parse_meminfo("MemTotal: many kB"), None);
        assert_eq!(parse_meminfo(""), None);
    }

    #[test]
    fn a_containers_cache_counts_as_free() {
        let expected = Memory {
            total: 1000,
            free: 900,
        };
        assert_eq!(
            parse_cgroup("1000\n", "300\n", "anon 5\ninactive_file 200\n"),
            Some(expected)
        );
        assert_eq!(parse_cgroup("max\n", "300\n", ""), None);
        assert_eq!(
            parse_cgroup("100\n", "300\n", "").map(|it| it.free),
            Some(0)
        );
    }
}
