//! Pages that go from KV to adapters and back: the conformance checks, in both precisions.

use openlora_kernels::cpu::pages::CpuPages;
use openlora_kernels::cpu::{Cpu, Isa};
use openlora_kernels::{Precision, conformance};

fn poison(pool: &mut CpuPages) {
    pool.fill(f32::NAN);
}

fn cpus() -> [Cpu; 2] {
    [Precision::Quantised, Precision::F32].map(|precision| Cpu::new(2, precision, Isa::detect()).expect("threads"))
}

#[test]
fn pages_that_change_owner_give_the_same_bits_as_fresh_ones() {
    for cpu in cpus() {
        conformance::pages::pages_that_change_owner_give_the_same_bits_as_fresh_ones(&cpu, poison);
    }
}

#[test]
fn a_page_has_one_owner() {
    for cpu in cpus() {
        conformance::pages::a_page_has_one_owner(&cpu, poison);
    }
}

#[test]
fn adapters_are_loaded_on_other_threads_while_steps_run() {
    for cpu in cpus() {
        conformance::pages::adapters_are_loaded_on_other_threads_while_steps_run(&cpu, poison);
    }
}
