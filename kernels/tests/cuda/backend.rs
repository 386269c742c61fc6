//! The whole backend on the emulated device: what every backend must keep.

use openlora_kernels::conformance::{self, Rounding, operations};
use openlora_kernels::cuda::Cuda;
use openlora_kernels::cuda::device::Element;
use openlora_kernels::cuda::emulated::Emulated;
use openlora_kernels::cuda::pages::CudaPages;

use crate::support::{emulated, sanitised};

fn backend(element: Element) -> Cuda<Emulated> {
    Cuda::new(emulated(), element).expect("memory")
}

#[test]
fn linears_agree_with_the_reference() {
    sanitised(|| {
        conformance::linear_agrees_with_reference(&backend(Element::F32), Rounding::F32);
        conformance::linear_agrees_with_reference(&backend(Element::F16), Rounding::Floats(11));
        conformance::linear_agrees_with_reference(&backend(Element::Bf16), Rounding::Floats(8));
    });
}

#[test]
fn rows_of_a_linear_do_not_depend_on_each_other() {
    sanitised(|| conformance::linear_rows_do_not_depend_on_each_other(&backend(Element::Bf16)));
}

const ELEMENTS: [(Element, Rounding); 3] =
    [(Element::F32, Rounding::F32), (Element::F16, Rounding::Floats(11)), (Element::Bf16, Rounding::Floats(8))];

fn poison(pool: &mut CudaPages<Emulated>) {
    pool.poison().expect("a sound device");
}

#[test]
fn row_operations_agree_with_the_reference() {
    for (element, rounding) in ELEMENTS {
        operations::row_operations_agree_with_reference(&backend(element), rounding);
    }
}

#[test]
fn attention_agrees_with_the_reference() {
    for (element, rounding) in ELEMENTS {
        operations::attention_agrees_with_reference(&|| backend(element), rounding, poison);
    }
}

#[test]
fn adapters_agree_with_the_reference_and_rows_with_themselves() {
    for (element, rounding) in ELEMENTS {
        operations::adapters_agree_with_reference(&backend(element), rounding, poison);
        operations::adapted_rows_do_not_depend_on_each_other(&backend(element), poison);
    }
}

#[test]
fn samples_agree_with_the_reference() {
    operations::samples_agree_with_reference(&backend(Element::F32));
    operations::samples_agree_with_reference(&backend(Element::Bf16));
}

fn on_every_element(check: impl Fn(&Cuda<Emulated>, fn(&mut CudaPages<Emulated>))) {
    for element in [Element::F32, Element::Bf16, Element::F16] {
        check(&backend(element), poison);
    }
}

#[test]
fn pages_that_change_owner_give_the_same_bits_as_fresh_ones() {
    sanitised(|| on_every_element(conformance::pages::pages_that_change_owner_give_the_same_bits_as_fresh_ones));
}

#[test]
fn a_page_has_one_owner() {
    sanitised(|| on_every_element(conformance::pages::a_page_has_one_owner));
}

#[test]
fn adapters_are_loaded_on_other_threads_while_steps_run() {
    // One element: who orders loads and steps is the same for all.
    sanitised(|| {
        conformance::pages::adapters_are_loaded_on_other_threads_while_steps_run(&backend(Element::Bf16), |pool| {
            pool.poison().expect("a sound device");
        });
    });
}
