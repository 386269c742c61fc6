//! Who owns a page, and which stream waits for which when it changes hands.

use std::sync::{Arc, Mutex};

use openlora_kernels::cuda::device::{Address, Device, Element, Gemm, Launch, Properties, Stream};
use openlora_kernels::cuda::emulated::Emulated;
use openlora_kernels::cuda::lora::{CudaAdapter, LoraLimits, LoraLinear, LoraPlan};
use openlora_kernels::cuda::pages::CudaPages;
use openlora_kernels::{KernelError, LoraRows, LoraSegment, SiteSpan};
use openlora_types::{Elements, Module, Site};
use rand::SeedableRng;
use rand::rngs::StdRng;

use crate::lora::{Adapter, LAYERS, Loaded, PAGE, World, bits, site};
use crate::support::{emulated, sanitised};

fn message<T: std::fmt::Debug>(result: Result<T, KernelError>) -> String {
    result.expect_err("refused").to_string()
}

#[test]
fn a_page_has_one_owner_until_it_is_given_back() {
    let mut pool = CudaPages::new(&emulated(), 4, 512).expect("memory");
    let set = pool.take(&[2, 0]).expect("free");
    assert_eq!(message(pool.take(&[1, 2])), "page 2 belongs to an adapter already");
    assert_eq!(message(pool.take(&[3, 3])), "page 3 belongs to an adapter already");
    assert_eq!(message(pool.take(&[3, 4])), "page 4 does not exist in this pool");
    assert_eq!(message(pool.check(&[1, 3, 0])), "page 0 is in a block table, but an adapter owns it");
    assert_eq!(message(pool.check(&[4])), "page 4 is in a block table, but does not exist in this pool");
    pool.check(&[1, 3]).expect("what could not be taken together was not taken at all");
    set.check().expect("both are the set's");
    assert_eq!(set.address(1), pool.address());
    assert_eq!(set.address(0), pool.address().plus(2 * 512));
    std::thread::spawn(move || drop(set)).join().expect("no panic");
    pool.check(&[0, 1, 2, 3]).expect("all are free");
    drop(pool.take(&[0, 1, 2, 3]).expect("all are free"));
}

#[test]
fn pages_that_change_owner_give_the_same_bits_and_others_keep_theirs() {
    sanitised(|| {
        let mut world = World::new(Element::Bf16, 70, [90, 33, 64], vec![(7, Some(0))]);
        world.add(&mut StdRng::seed_from_u64(18), [40, 3, 17], (true, false));
        let expected = bits(&world.check("fresh pages"));
        let (device, adapter, page_bytes) = (emulated(), &world.adapters[0], 1_280);
        let needed = CudaAdapter::<Emulated>::pages_needed(&adapter.weights.sizes(), page_bytes, Element::Bf16);
        assert!(needed >= 4, "{needed} pages");
        let count = needed as u32 + 2;
        let mut pool = CudaPages::new(&device, count as usize, page_bytes).expect("memory");
        let mut loaded = Loaded::new(&world, &device);
        for round in 0..count {
            // Every page was an adapter's and KV before.
            pool.poison().expect("poisoned");
            let mut order: Vec<u32> = (0..count).map(|page| (page + round) % count).collect();
            if round % 2 == 1 {
                order.reverse();
            }
            let (kv, pages) = order.split_at(2);
            let set = pool.take(pages).expect("free pages");
            let weights = &adapter.weights;
            loaded.adapters =
                vec![CudaAdapter::load(weights, &adapter.output_scales, LAYERS, Element::Bf16, set).expect("it fits")];
            assert!(kv.iter().all(|page| pool.read(*page).expect("read").iter().all(|byte| *byte == 0xff)));
            assert_eq!(bits(&loaded.run(0..7, &[(7, Some(0))])), expected, "round {round}");
            pool.check(kv).expect("KV beside it");
            pool.check(&pages[..1]).expect_err("the adapter's");
            pool.poison().expect("poisoned");
            assert_eq!(bits(&loaded.run(0..7, &[(7, Some(0))])), expected, "round {round}, after KV was written");
            loaded.adapters.clear();
        }
    });
}

#[test]
fn adapters_that_come_and_go_take_no_memory_once_each_size_was_seen_and_answer_the_same() {
    sanitised(|| {
        let mut world = World::new(Element::Bf16, 70, [90, 33, 64], vec![(7, Some(0))]);
        let mut rng = StdRng::seed_from_u64(20);
        // Two of one size, one larger for its vectors, one with fewer sites.
        world.add(&mut rng, [40, 3, 17], (false, false));
        world.add(&mut rng, [40, 3, 17], (false, false));
        world.add(&mut rng, [64, 8, 16], (true, true));
        world.add(&mut rng, [0, 5, 0], (false, false));
        let device = emulated();
        let mut loaded = Loaded::new(&world, &device);
        let expected: Vec<_> = (0..4).map(|i| bits(&loaded.run(0..7, &[(7, Some(i))]))).collect();
        loaded.adapters.clear();
        let mut pool = CudaPages::new(&device, 32, 4_096).expect("memory");
        let mut seen = Vec::new();
        for (round, pair) in [[0, 2], [1, 3], [2, 0], [3, 1], [2, 1], [0, 3], [1, 2]].into_iter().enumerate() {
            let mut load = |(i, first): (usize, u32)| {
                let Adapter { weights, output_scales } = &world.adapters[i];
                let needed = CudaAdapter::<Emulated>::pages_needed(&weights.sizes(), 4_096, Element::Bf16) as u32;
                let set = pool.take(&(first..first + needed).collect::<Vec<_>>()).expect("free pages");
                CudaAdapter::load(weights, output_scales, LAYERS, Element::Bf16, set).expect("it fits")
            };
            loaded.adapters = pair.into_iter().zip([0, 16]).map(&mut load).collect();
            for (place, i) in pair.into_iter().enumerate() {
                assert_eq!(bits(&loaded.run(0..7, &[(7, Some(place))])), expected[i], "round {round}, adapter {i}");
            }
            seen.push(device.memory_free().expect("a sound device"));
            loaded.adapters.clear();
            assert_eq!(device.memory_free().expect("a sound device"), seen[round], "round {round}: given back");
        }
        // Every size was seen in the first two rounds.
        assert!(seen[0] > seen[1] && seen[1..].iter().all(|free| *free == seen[1]), "{seen:?}");
    });
}

/// The emulated device, and in which order streams were told what.
#[derive(Debug)]
struct Recorder {
    inner: Arc<Emulated>,
    log: Mutex<Vec<String>>,
}

impl Recorder {
    fn note(&self, what: String) {
        self.log.lock().expect("no panic").push(what);
    }
    fn noted(&self) -> Vec<String> {
        let mut log = std::mem::take(&mut *self.log.lock().expect("no panic"));
        log.dedup();
        log
    }
}

impl Device for Recorder {
    type Graph = <Emulated as Device>::Graph;
    type Event = Stream;
    type Landing = <Emulated as Device>::Landing;

    fn properties(&self) -> &Properties {
        self.inner.properties()
    }
    fn memory_free(&self) -> Result<usize, KernelError> {
        self.inner.memory_free()
    }
    fn allocate(&self, bytes: usize) -> Result<Address, KernelError> {
        self.note("allocate".into());
        self.inner.allocate(bytes)
    }
    fn free(&self, address: Address, bytes: usize) {
        self.note("free".into());
        self.inner.free(address, bytes);
    }
    unsafe fn write(&self, stream: Stream, to: Address, bytes: &[u8]) -> Result<(), KernelError> {
        self.note(format!("{stream:?} writes"));
        // SAFETY: the caller's promise.
        unsafe { self.inner.write(stream, to, bytes) }
    }
    unsafe fn read(&self, stream: Stream, from: Address, bytes: &mut [u8]) -> Result<(), KernelError> {
        // SAFETY: the caller's promise.
        unsafe { self.inner.read(stream, from, bytes) }
    }
    fn landing(&self, bytes: usize) -> Result<Self::Landing, KernelError> {
        self.inner.landing(bytes)
    }
    unsafe fn enqueue_read(
        &self,
        stream: Stream,
        from: Address,
        bytes: usize,
        landing: &mut Self::Landing,
    ) -> Result<(), KernelError> {
        // SAFETY: the caller's promise.
        unsafe { self.inner.enqueue_read(stream, from, bytes, landing) }
    }
    fn landed<'a>(&self, landing: &'a mut Self::Landing) -> Result<&'a [u8], KernelError> {
        self.inner.landed(landing)
    }
    unsafe fn zero(&self, stream: Stream, at: Address, bytes: usize) -> Result<(), KernelError> {
        // SAFETY: the caller's promise.
        unsafe { self.inner.zero(stream, at, bytes) }
    }
    unsafe fn launch(&self, stream: Stream, launch: &Launch<'_>) -> Result<(), KernelError> {
        // SAFETY: the caller's promise.
        unsafe { self.inner.launch(stream, launch) }
    }
    unsafe fn gemm(&self, stream: Stream, gemm: &Gemm) -> Result<(), KernelError> {
        // SAFETY: the caller's promise.
        unsafe { self.inner.gemm(stream, gemm) }
    }
    fn capture(&self, record: &mut dyn FnMut() -> Result<(), KernelError>) -> Result<Self::Graph, KernelError> {
        self.inner.capture(record)
    }
    unsafe fn replay(&self, graph: &Self::Graph) -> Result<(), KernelError> {
        // SAFETY: the caller's promise.
        unsafe { self.inner.replay(graph) }
    }
    fn record(&self, stream: Stream) -> Result<Stream, KernelError> {
        self.note(format!("{stream:?} is marked"));
        Ok(stream)
    }
    fn wait(&self, stream: Stream, event: &Stream) -> Result<(), KernelError> {
        self.note(format!("{stream:?} waits for {event:?}"));
        Ok(())
    }
    fn synchronise(&self) -> Result<(), KernelError> {
        self.inner.synchronise()
    }
}

/// Copies wait for the steps that may still read the pages; steps wait for the copies, once, before the first that reads them,
/// or when an adapter goes that none has used, loaded or not.
#[test]
fn streams_wait_for_each_other_where_pages_change_hands() {
    let device = Arc::new(Recorder { inner: emulated(), log: Mutex::default() });
    let mut rng = StdRng::seed_from_u64(19);
    let place = Site { layer: 1, module: Module::K };
    let span = SiteSpan { site: place, index: place.index(LAYERS), outputs: 0..20 };
    let first = site(&mut rng, place, (33, 20), 3, Element::F32);
    let adapter = Adapter::new(&mut rng, vec![first], (false, false));
    let linear = LoraLinear { sites: vec![span], inputs: 33, outputs: 20, bias: false, embedding: false };
    let limits = LoraLimits { rows: 4, segments: 4, rank: 8 };
    let plan = LoraPlan::new(&device, Element::F16, &[linear], limits).expect("memory");
    let mut pool = CudaPages::new(&device, 1, PAGE).expect("memory");
    device.noted();
    // Before its first byte: who had the table before may have enqueued steps until then.
    const TABLE: [&str; 1] = ["allocate"];
    const LOADED: [&str; 4] = ["Compute is marked", "Copy waits for Compute", "Copy writes", "Copy is marked"];
    let mut load = |adapter: &Adapter| {
        let pages = pool.take(&[0]).expect("free");
        CudaAdapter::load(&adapter.weights, &adapter.output_scales, LAYERS, Element::F16, pages)
    };

    let used = load(&adapter).expect("it fits");
    assert_eq!(device.noted(), [&TABLE[..], &LOADED].concat());
    let segments = [LoraSegment { row: 0, rows: 1, adapter: Some(&used) }];
    for waits in [&["Compute waits for Copy"][..], &[]] {
        plan.segments(&LoraRows { segments: &segments }).expect("own pages");
        assert_eq!(device.noted(), waits);
    }
    drop(used);
    assert_eq!(device.noted(), [""; 0], "nothing is given back");

    drop(load(&adapter).expect("it fits"));
    assert_eq!(device.noted(), [&LOADED[..], &["Compute waits for Copy"]].concat());

    // The second site is refused when the first is on its way.
    let mut broken = adapter.clone();
    let mut second = site(&mut rng, Site { layer: 1, module: Module::V }, (33, 9_000), 8, Element::F32);
    let Elements::F32(numbers) = &mut second.b.elements else { unreachable!("made so") };
    *numbers.last_mut().expect("some") = 1e9;
    broken.weights.sites.push(second);
    broken.output_scales.push(None);
    let needed = CudaAdapter::<Recorder>::pages_needed(&broken.weights.sizes(), 20_480, Element::F16);
    let mut pool = CudaPages::new(&device, needed, 20_480).expect("memory");
    device.noted();
    let pages: Vec<u32> = (0..needed as u32).collect();
    let set = pool.take(&pages).expect("free");
    let error = CudaAdapter::load(&broken.weights, &broken.output_scales, LAYERS, Element::F16, set).expect_err("1e9");
    assert!(matches!(error, KernelError::AdapterRange { .. }), "{error}");
    assert_eq!(device.noted(), [&TABLE[..], &LOADED, &["Compute waits for Copy"]].concat());
    drop(pool.take(&pages).expect("free again"));
}
