//! Matrix products by cuBLASLt.
//!
//! Row-major `out = x W^T` is, to a library that counts by columns, `out^T = (W^T)^T x^T`: A is w transposed, B is x, and m, n, k
//! are outputs, rows, inputs. So one algorithm serves any number of rows by another n.
//!
//! # Which bits a row gets
//! cuBLASLt, asked anew for every number of rows, would answer with another algorithm and so with another order of the sum.
//! Here it is asked once for a linear's shape and a *class* of rows ([`CLASSES`]), and the answer serves every number of rows
//! of the class. Within an algorithm every output is one tile's sum over k in the algorithm's own order; where k is split, the
//! number of parts is fixed in the algorithm and the parts are added up in f32 in the workspace. Algorithms that let parts of
//! k depend on the number of tiles would name another reduction and are not taken.
//!
//! | compared | bits |
//! |---|---|
//! | a row in two steps of the same class | the same, by the above; NVIDIA promises it for no algorithm, a test on the device compares |
//! | a row in two steps of different classes (as a token that was prefilled, then decoded again) | may differ by the order of the sum |
//! | the same, with [`Products::one_algorithm`] | as within a class, at some cost in speed |
//! | two runs of the same program on the same GPU and library | the same |
//! | another GPU, driver or version of the library | may differ |

use std::collections::HashMap;
use std::ffi::{c_int, c_void};
use std::fmt;
use std::sync::{Arc, Mutex};

use cudarc::cublaslt::sys as lt;

use super::context::{Shared, locked};
use super::device::{Element, Gemm};
use super::library::CublasLt;
use crate::KernelError;

/// How algorithms are chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Products {
    /// One algorithm for any number of rows, instead of one for each class.
    pub one_algorithm: bool,
    /// Algorithms may split k in a fixed number of parts: faster where a linear has few outputs and few rows are asked for.
    pub split: bool,
}

impl Default for Products {
    fn default() -> Self {
        Self { one_algorithm: false, split: true }
    }
}

/// A range of numbers of rows that get the same algorithm.
#[derive(Debug, PartialEq, Eq)]
struct Class {
    /// The largest.
    rows_max: usize,
    /// Rows for which cuBLASLt is asked.
    asked: usize,
    /// Rows for which its answer must work too.
    also: &'static [usize],
    /// Whether k may be split: not where rows alone fill the device.
    split: bool,
}

/// Small decode steps, large ones, and prefill.
const CLASSES: [Class; 3] = [
    Class { rows_max: 64, asked: 64, also: &[1, 7, 33], split: true },
    Class { rows_max: 256, asked: 256, also: &[65, 133], split: true },
    Class { rows_max: usize::MAX, asked: 2048, also: &[257, 1000, 8192], split: false },
];
/// For [`Products::one_algorithm`].
const ANY: Class = Class { rows_max: usize::MAX, asked: 128, also: &[1, 7, 33, 64, 257, 1000, 8192], split: false };

impl Products {
    fn class(self, rows: usize) -> &'static Class {
        if self.one_algorithm {
            return &ANY;
        }
        CLASSES.iter().find(|class| rows <= class.rows_max).unwrap_or(&CLASSES[2])
    }
}

/// What NVIDIA advises for Hopper; algorithms that want more are not taken.
pub(super) const WORKSPACE_BYTES: usize = 32 << 20;
/// How many answers of cuBLASLt's are looked through.
const ANSWERS: usize = 32;
/// Numbers of rows that are prepared at a time; more are prepared again.
const PREPARED_MAX: usize = 4096;
/// Alignment, in bytes, beyond which more does not help.
const ALIGNMENT_MAX: u64 = 16;

/// A linear, as far as algorithms differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Shape {
    inputs: usize,
    outputs: usize,
    element: Element,
    out_element: Element,
    /// Of all three matrices.
    alignment: u32,
}

impl Shape {
    fn of(gemm: &Gemm) -> Self {
        let together = gemm.x.0 | gemm.w.0 | gemm.out.0 | ALIGNMENT_MAX;
        Self {
            inputs: gemm.inputs,
            outputs: gemm.outputs,
            element: gemm.element,
            out_element: gemm.out_element,
            alignment: 1 << together.trailing_zeros(),
        }
    }
}

/// cuBLASLt on a device.
pub(super) struct Blas {
    library: Arc<CublasLt>,
    handle: lt::cublasLtHandle_t,
    products: Products,
    plans: Mutex<Plans>,
    /// Last: it goes after the handle.
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Plans {
    /// By shape and largest number of rows of the class.
    algorithms: HashMap<(Shape, usize), lt::cublasLtMatmulAlgo_t>,
    /// By shape and rows.
    prepared: HashMap<(Shape, usize), Arc<Plan>>,
}

/// A product that only addresses are missing from.
struct Plan {
    matrices: Matrices,
    algorithm: lt::cublasLtMatmulAlgo_t,
}

// SAFETY: descriptors are plain memory that is only read after they are made; the handle is documented to be usable from several
// threads at a time.
unsafe impl Send for Blas {}
// SAFETY: as above; what changes is behind a mutex.
unsafe impl Sync for Blas {}
// SAFETY: as above.
unsafe impl Send for Plan {}
// SAFETY: as above.
unsafe impl Sync for Plan {}

impl fmt::Debug for Blas {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Blas").field("library", &self.library).field("products", &self.products).finish_non_exhaustive()
    }
}

impl Blas {
    /// With the device's context current.
    pub(super) fn new(shared: Arc<Shared>, library: CublasLt, products: Products) -> Result<Self, KernelError> {
        let mut handle = std::ptr::null_mut();
        // SAFETY: a place for a handle; the context is current.
        let status = unsafe { (library.cublasLtCreate)(&mut handle) };
        checked(status).map_err(|reason| shared.failure("starting cuBLASLt", reason))?;
        Ok(Self { library: Arc::new(library), handle, products, plans: Mutex::default(), shared })
    }

    /// Enqueues a product.
    ///
    /// # Safety
    /// As [`Device::gemm`](super::device::Device::gemm); the context is current, `workspace` has [`WORKSPACE_BYTES`], which
    /// products of one stream only use.
    pub(super) unsafe fn multiply(
        &self,
        stream: cudarc::driver::sys::CUstream,
        workspace: u64,
        gemm: &Gemm,
    ) -> Result<(), KernelError> {
        let plan = self.plan(gemm)?;
        let (matrices, one, zero) = (&plan.matrices, 1.0_f32, 0.0_f32);
        let pointer = |address: u64| address as *mut c_void;
        let scalar = |value: &f32| std::ptr::from_ref(value).cast::<c_void>();
        // SAFETY: handle and descriptors are alive; the matrices are where the caller says; scalars are on the host, as is the
        // descriptor's default, and are read before this returns; with a beta of 0, C, which is D, is not read.
        let status = unsafe {
            (self.library.cublasLtMatmul)(
                self.handle,
                matrices.product.0,
                scalar(&one),
                pointer(gemm.w.0),
                matrices.w.0,
                pointer(gemm.x.0),
                matrices.x.0,
                scalar(&zero),
                pointer(gemm.out.0),
                matrices.out.0,
                pointer(gemm.out.0),
                matrices.out.0,
                &plan.algorithm,
                pointer(workspace),
                WORKSPACE_BYTES,
                stream.cast(),
            )
        };
        if status == 0 {
            return Ok(());
        }
        let what = describe(gemm.rows, &Shape::of(gemm));
        Err(match status {
            // The device failed, not the request.
            11 | 13 | 14 if !self.shared.records() => self.shared.lose(what, name_of(status)),
            _ => self.shared.failure(what, name_of(status)),
        })
    }

    fn plan(&self, gemm: &Gemm) -> Result<Arc<Plan>, KernelError> {
        let (shape, rows) = (Shape::of(gemm), gemm.rows);
        let mut plans = locked(&self.plans);
        if let Some(plan) = plans.prepared.get(&(shape, rows)) {
            return Ok(Arc::clone(plan));
        }
        let failure = |reason: String| self.shared.failure(describe(rows, &shape), reason);
        let class = self.products.class(rows);
        let algorithm = match plans.algorithms.get(&(shape, class.rows_max)) {
            Some(algorithm) => *algorithm,
            None => {
                let algorithm = self.choose(&shape, class).map_err(failure)?;
                plans.algorithms.insert((shape, class.rows_max), algorithm);
                algorithm
            }
        };
        let matrices = Matrices::new(&self.library, &shape, rows).map_err(failure)?;
        if !self.fits(&matrices, &algorithm) {
            return Err(failure(format!("the algorithm of up to {} rows does not do {rows}", class.rows_max)));
        }
        let plan = Arc::new(Plan { matrices, algorithm });
        if plans.prepared.len() >= PREPARED_MAX {
            plans.prepared.clear();
        }
        plans.prepared.insert((shape, rows), Arc::clone(&plan));
        Ok(plan)
    }

    /// The first of cuBLASLt's answers, best first, that keeps bits and works for the whole class.
    fn choose(&self, shape: &Shape, class: &Class) -> Result<lt::cublasLtMatmulAlgo_t, String> {
        let split = self.products.split && class.split;
        self.choose_among(shape, class, split).or_else(|reason| {
            // Split, there may be none where there is one that is not.
            if split { self.choose_among(shape, class, false) } else { Err(reason) }
        })
    }

    fn choose_among(&self, shape: &Shape, class: &Class, split: bool) -> Result<lt::cublasLtMatmulAlgo_t, String> {
        let asked = Matrices::new(&self.library, shape, class.asked)?;
        let preference = Preference::new(&self.library, shape.alignment, split)?;
        // SAFETY: plain numbers; zero is a value of each of them.
        let mut answers: [lt::cublasLtMatmulHeuristicResult_t; ANSWERS] = unsafe { std::mem::zeroed() };
        let mut count = 0;
        // SAFETY: handle and descriptors are alive; there is room for as many answers as are asked for.
        checked(unsafe {
            (self.library.cublasLtMatmulAlgoGetHeuristic)(
                self.handle,
                asked.product.0,
                asked.w.0,
                asked.x.0,
                asked.out.0,
                asked.out.0,
                preference.handle,
                ANSWERS as c_int,
                answers.as_mut_ptr(),
                &mut count,
            )
        })?;
        let mut rows = vec![asked];
        for also in class.also {
            rows.push(Matrices::new(&self.library, shape, *also)?);
        }
        let mut refused = String::new();
        for answer in &answers[..usize::try_from(count).unwrap_or(0).min(ANSWERS)] {
            let (parts, reduction) = self.sums(&answer.algo);
            let fixed = order_is_fixed(parts, reduction, split);
            let fits = rows.iter().filter(|matrices| self.fits(matrices, &answer.algo)).count();
            if fixed && fits == rows.len() {
                return Ok(answer.algo);
            }
            refused +=
                &format!(" ({parts:?} parts, reduction {reduction:?}, does {fits} of {} numbers of rows)", rows.len());
        }
        Err(format!("none of cuBLASLt's {count} algorithms serves every number of rows and keeps bits:{refused}"))
    }

    /// In how many parts an algorithm adds up k, and by which of cuBLASLt's reductions it joins them.
    fn sums(&self, algorithm: &lt::cublasLtMatmulAlgo_t) -> (Option<i32>, Option<u32>) {
        use lt::cublasLtMatmulAlgoConfigAttributes_t as Config;
        let number = |which| {
            let (mut value, mut written) = (0_u32, 0);
            let place = std::ptr::from_mut(&mut value).cast();
            // SAFETY: an algorithm that cuBLASLt gave; room for the four bytes that both attributes have.
            let status = unsafe {
                (self.library.cublasLtMatmulAlgoConfigGetAttribute)(algorithm, which, place, 4, &mut written)
            };
            (status == 0).then_some(value)
        };
        (
            number(Config::CUBLASLT_ALGO_CONFIG_SPLITK_NUM).map(u32::cast_signed),
            number(Config::CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME),
        )
    }

    /// Whether the algorithm does this product in the workspace there is.
    fn fits(&self, matrices: &Matrices, algorithm: &lt::cublasLtMatmulAlgo_t) -> bool {
        // SAFETY: plain numbers; zero is a value of each of them.
        let mut result: lt::cublasLtMatmulHeuristicResult_t = unsafe { std::mem::zeroed() };
        // SAFETY: handle and descriptors are alive; a place for the result.
        let status = unsafe {
            (self.library.cublasLtMatmulAlgoCheck)(
                self.handle,
                matrices.product.0,
                matrices.w.0,
                matrices.x.0,
                matrices.out.0,
                matrices.out.0,
                algorithm,
                &mut result,
            )
        };
        status == 0 && result.workspaceSize <= WORKSPACE_BYTES
    }
}

impl Drop for Blas {
    fn drop(&mut self) {
        if self.shared.enter("closing cuBLASLt").is_ok() {
            // SAFETY: the handle is not used again.
            unsafe { (self.library.cublasLtDestroy)(self.handle) };
        }
    }
}

/// Whether an algorithm's sums are added up in an order that neither the number of rows nor the device's load changes: k in one
/// run, or in a fixed number of parts whose sums are kept in f32 and added up at the end.
fn order_is_fixed(parts: Option<i32>, reduction: Option<u32>, split: bool) -> bool {
    let none = lt::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_NONE as u32;
    let in_f32 = lt::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;
    match (parts, reduction) {
        (Some(0 | 1), Some(reduction)) => reduction == none,
        (Some(2..), Some(reduction)) => split && reduction == in_f32,
        _ => false,
    }
}

/// A descriptor with what destroys it.
struct Descriptor<H: Copy>(H, Arc<CublasLt>, fn(&CublasLt) -> unsafe extern "C" fn(H) -> u32);

impl<H: Copy> Drop for Descriptor<H> {
    fn drop(&mut self) {
        // SAFETY: made by cuBLASLt, not used again.
        unsafe { (self.2)(&self.1)(self.0) };
    }
}

/// The product and its three matrices, as cuBLASLt sees them.
struct Matrices {
    product: Descriptor<lt::cublasLtMatmulDesc_t>,
    w: Descriptor<lt::cublasLtMatrixLayout_t>,
    x: Descriptor<lt::cublasLtMatrixLayout_t>,
    out: Descriptor<lt::cublasLtMatrixLayout_t>,
}

impl Matrices {
    fn new(library: &Arc<CublasLt>, shape: &Shape, rows: usize) -> Result<Self, String> {
        let mut handle = std::ptr::null_mut();
        // f32 sums; of f32 this is plain f32 arithmetic, TF32 is another type.
        let (compute, scale) = (lt::cublasComputeType_t::CUBLAS_COMPUTE_32F, lt::cudaDataType::CUDA_R_32F);
        // SAFETY: a place for a descriptor.
        checked(unsafe { (library.cublasLtMatmulDescCreate)(&mut handle, compute, scale) })?;
        let product = Descriptor(handle, Arc::clone(library), |library| library.cublasLtMatmulDescDestroy);
        // CUBLAS_OP_T, which is in a header that cudarc has for the larger library only.
        let transposed = 1_u32;
        let attribute = lt::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA;
        // SAFETY: the descriptor is alive; the attribute is four bytes.
        checked(unsafe {
            let value = std::ptr::from_ref(&transposed).cast();
            (library.cublasLtMatmulDescSetAttribute)(product.0, attribute, value, 4)
        })?;
        let layout = |element: Element, columns: usize, rows: usize| {
            let mut handle = std::ptr::null_mut();
            let kind = match element {
                Element::F32 => lt::cudaDataType::CUDA_R_32F,
                Element::Bf16 => lt::cudaDataType::CUDA_R_16BF,
                Element::F16 => lt::cudaDataType::CUDA_R_16F,
            };
            // A row-major matrix is, by columns, its transpose.
            // SAFETY: a place for a descriptor.
            checked(unsafe {
                (library.cublasLtMatrixLayoutCreate)(&mut handle, kind, columns as u64, rows as u64, columns as i64)
            })?;
            let destroy: fn(&CublasLt) -> _ = |library| library.cublasLtMatrixLayoutDestroy;
            Ok::<_, String>(Descriptor(handle, Arc::clone(library), destroy))
        };
        Ok(Self {
            w: layout(shape.element, shape.inputs, shape.outputs)?,
            x: layout(shape.element, shape.inputs, rows)?,
            out: layout(shape.out_element, shape.outputs, rows)?,
            product,
        })
    }
}

/// What algorithms are wanted.
struct Preference {
    library: Arc<CublasLt>,
    handle: lt::cublasLtMatmulPreference_t,
}

impl Preference {
    fn new(library: &Arc<CublasLt>, alignment: u32, split: bool) -> Result<Self, String> {
        use lt::cublasLtMatmulPreferenceAttributes_t as Wanted;
        let mut handle = std::ptr::null_mut();
        // SAFETY: a place for a descriptor.
        checked(unsafe { (library.cublasLtMatmulPreferenceCreate)(&mut handle) })?;
        let preference = Self { library: Arc::clone(library), handle };
        preference.set(Wanted::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &WORKSPACE_BYTES.to_ne_bytes())?;
        let reductions = if split {
            lt::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE
        } else {
            lt::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_NONE
        };
        preference.set(Wanted::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &(reductions as u32).to_ne_bytes())?;
        for matrix in [
            Wanted::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
            Wanted::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
            Wanted::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
            Wanted::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
        ] {
            preference.set(matrix, &alignment.to_ne_bytes())?;
        }
        Ok(preference)
    }

    fn set(&self, which: lt::cublasLtMatmulPreferenceAttributes_t, value: &[u8]) -> Result<(), String> {
        // SAFETY: the descriptor is alive, and the value has as many bytes as is said.
        checked(unsafe {
            let from = value.as_ptr().cast();
            (self.library.cublasLtMatmulPreferenceSetAttribute)(self.handle, which, from, value.len())
        })
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: made by cuBLASLt, not used again.
        unsafe { (self.library.cublasLtMatmulPreferenceDestroy)(self.handle) };
    }
}

fn describe(rows: usize, shape: &Shape) -> String {
    let (element, out) = (shape.element.suffix(), shape.out_element.suffix());
    format!("a product of {rows} rows, {} inputs and {} outputs ({element} to {out})", shape.inputs, shape.outputs)
}

fn checked(status: u32) -> Result<(), String> {
    if status == 0 { Ok(()) } else { Err(name_of(status)) }
}

/// cuBLAS has no text for its errors in this library, only in the larger one.
fn name_of(status: u32) -> String {
    let name = match status {
        1 => "NOT_INITIALIZED",
        3 => "ALLOC_FAILED",
        7 => "INVALID_VALUE",
        8 => "ARCH_MISMATCH",
        11 => "MAPPING_ERROR",
        13 => "EXECUTION_FAILED",
        14 => "INTERNAL_ERROR",
        15 => "NOT_SUPPORTED",
        16 => "LICENSE_ERROR",
        _ => return format!("cuBLASLt: status {status}"),
    };
    format!("cuBLASLt: CUBLAS_STATUS_{name} ({status})")
}

#[cfg(test)]
mod tests {
    use super::super::device::Address;
    use super::super::library::Places;
    use super::*;

    #[test]
    fn every_number_of_rows_has_one_class() {
        let classes = Products::default();
        for (rows, rows_max) in [(1, 64), (64, 64), (65, 256), (256, 256), (257, usize::MAX), (1 << 20, usize::MAX)] {
            assert_eq!(classes.class(rows).rows_max, rows_max);
            assert_eq!(Products { one_algorithm: true, split: true }.class(rows), &ANY);
        }
        for class in CLASSES.iter().chain([&ANY]) {
            assert!(class.asked <= class.rows_max && class.also.iter().all(|rows| *rows <= class.rows_max));
        }
    }

    #[test]
    fn only_fixed_orders_of_sums_are_taken() {
        let (none, in_place, in_f32, in_output) = (Some(0), Some(1), Some(2), Some(4));
        assert!(order_is_fixed(Some(1), none, false) && order_is_fixed(Some(0), none, true));
        assert!(order_is_fixed(Some(4), in_f32, true) && !order_is_fixed(Some(4), in_f32, false));
        for reduction in [in_place, in_output, None] {
            assert!(!order_is_fixed(Some(1), reduction, true) && !order_is_fixed(Some(4), reduction, true));
        }
        assert!(!order_is_fixed(Some(4), none, true) && !order_is_fixed(Some(-1), none, true));
        assert!(!order_is_fixed(None, none, true));
    }

    #[test]
    fn alignment_is_that_of_the_least_aligned_matrix() {
        let gemm = |x, w, out| Gemm {
            rows: 1,
            inputs: 8,
            outputs: 8,
            element: Element::Bf16,
            out_element: Element::F32,
            x: Address(x),
            w: Address(w),
            out: Address(out),
        };
        assert_eq!(Shape::of(&gemm(0x100, 0x200, 0x300)).alignment, 16);
        assert_eq!(Shape::of(&gemm(0x100, 0x204, 0x300)).alignment, 4);
        assert_eq!(Shape::of(&gemm(0x102, 0x204, 0x300)).alignment, 2);
    }

    /// cuBLASLt takes every descriptor and attribute that is set here; none of that needs a GPU.
    #[test]
    #[ignore = "needs cuBLASLt (half a gigabyte), no GPU: pip install nvidia-cublas"]
    fn the_library_takes_what_is_set() {
        let library = Arc::new(CublasLt::load(&Places::from_environment(), None).unwrap());
        assert!(library.version().0 >= 12, "{:?}", library.version());
        for (element, out_element) in
            [(Element::F32, Element::F32), (Element::Bf16, Element::Bf16), (Element::F16, Element::F32)]
        {
            let shape = Shape { inputs: 4096, outputs: 6144, element, out_element, alignment: 16 };
            Matrices::new(&library, &shape, 7).unwrap();
            for split in [false, true] {
                Preference::new(&library, 16, split).unwrap();
            }
        }
        // A setting that the library refuses is an error.
        let preference = Preference::new(&library, 16, true).unwrap();
        let wanted = lt::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK;
        assert_eq!(preference.set(wanted, &[0]).unwrap_err(), "cuBLASLt: CUBLAS_STATUS_INVALID_VALUE (7)");
    }
}
