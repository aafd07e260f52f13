//! The memory that a process may have.

use std::fs;

/// Bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct HostMemory {
    pub total: u64,
    pub free: u64,
}

/// What is there for this process: the machine's memory, or its container's if that is less.
pub(crate) fn read() -> Option<HostMemory> {
    let machine = parse_meminfo(&fs::read_to_string("/proc/meminfo").ok()?)?;
    let read = |name: &str| fs::read_to_string(format!("/sys/fs/cgroup/{name}")).ok();
    let container = parse_cgroup(
        &read("memory.max").unwrap_or_default(),
        &read("memory.current").unwrap_or_default(),
        &read("memory.stat").unwrap_or_default(),
    );
    Some(match container {
        Some(container) => HostMemory {
            total: machine.total.min(container.total),
            free: machine.free.min(container.free),
        },
        None => machine,
    })
}

fn parse_meminfo(text: &str) -> Option<HostMemory> {
    let kib = |key: &str| -> Option<u64> {
        let rest = text.lines().find_map(|line| line.strip_prefix(key))?;
        rest.trim().strip_suffix("kB")?.trim().parse().ok()
    };
    Some(HostMemory {
        total: kib("MemTotal:")?.saturating_mul(1024),
        free: kib("MemAvailable:")?.saturating_mul(1024),
    })
}

/// A container's limit; file pages that can be dropped count as free.
fn parse_cgroup(max: &str, current: &str, stat: &str) -> Option<HostMemory> {
    let total: u64 = max.trim().parse().ok()?;
    let used: u64 = current.trim().parse().ok()?;
    let cached: u64 = stat
        .lines()
        .find_map(|line| line.strip_prefix("inactive_file "))
        .and_then(|number| number.trim().parse().ok())
        .unwrap_or(0);
    Some(HostMemory {
        total,
        free: total.saturating_sub(used.saturating_sub(cached)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo_is_read_in_kibibytes() {
        let text = "MemTotal:       8000 kB\nMemFree: 1 kB\nMemAvailable:   4000 kB\n";
        let expected = HostMemory {
            total: 8000 << 10,
            free: 4000 << 10,
        };
        assert_eq!(parse_meminfo(text), Some(expected));
        assert_eq!(parse_meminfo("MemTotal: many kB"), None);
        assert_eq!(parse_meminfo(""), None);
    }

    #[test]
    fn a_containers_cache_counts_as_free() {
        let expected = HostMemory {
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
