//! A long text takes no more memory than a short one. Alone in its program: what is measured is that of the
//! whole process.
#![cfg(all(target_os = "linux", feature = "flex"))]

use burn::tensor::Device;
use mambabyte::config::MambaConfig;
use mambabyte::generate::{Generator, GeneratorOptions, Request};

/// Memory of this process, in bytes.
fn resident() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").expect("Linux has it");
    let pages = statm
        .split(' ')
        .nth(1)
        .and_then(|it| it.parse::<usize>().ok());
    4096 * pages.expect("a number of pages")
}

#[test]
fn memory_does_not_grow_with_the_text() {
    let device = Device::flex();
    let model = MambaConfig::new(16, 1).init_lm(1, &device);
    let mut generator = Generator::new(model, &device, GeneratorOptions::default());
    let request = Request {
        max_new_bytes: 50_000,
        ..Request::new("x")
    };
    let mut session = generator.start(&[request]).expect("valid");
    let mut after = Vec::new();
    while !session.is_finished() {
        let pieces = session.advance(1000).expect("no failure");
        assert_eq!(pieces[0].bytes.len(), 1000);
        after.push(resident());
    }
    // From 5,000 bytes to 50,000.
    assert!(after[49] < after[4] + (1 << 20), "{after:?}");
}
