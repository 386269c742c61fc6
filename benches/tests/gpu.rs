//! The check and the timings of a GPU, on the emulated device.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use openlora_benches::gpu::check::{self, Options};
use openlora_kernels::cuda::device::Element;
use openlora_kernels::cuda::emulated::Emulated;

fn device() -> Arc<Emulated> {
    Emulated::new(7).expect("the emulated device")
}

#[test]
fn a_sound_device_passes_every_check() {
    let options = Options {
        elements: vec![Element::Bf16, Element::F32],
        fixtures: Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures"),
        models_max: 2,
        steps: 40,
        budget: Duration::from_secs(3600),
        seed: 7,
    };
    let mut told = 0;
    let findings = check::run(&device(), &options, &mut |_| told += 1);
    println!("{}", check::table(&findings));
    assert_eq!((told, findings.len()), (26, 26));
    for finding in &findings {
        assert!(finding.failure.is_none() && finding.cases > 0, "{finding:?}");
    }
}
