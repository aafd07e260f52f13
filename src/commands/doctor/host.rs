//! Processor, memory and disks.

use std::path::Path;
use std::thread;

use super::{Check, Device, gib};
use crate::device::host_memory;

/// Less free space than this is worth a word: a checkpoint of the 353M model has 4.2 GB.
const LITTLE_DISK: u64 = 10 << 30;

/// The processor as a device.
pub(super) fn device(compiled: bool) -> Device {
    let memory = host_memory::read();
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
}
