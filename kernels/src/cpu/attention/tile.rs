//! The inner loops of attention: a tile of queries against a group of key panels.

use super::super::ahead::ask;
use super::super::pages::LINE;
use super::super::vector_math::{Chunk, Element, Kernel, LANES, Simd, exp_to_88, load_part, store_part};

/// Queries of a tile: enough that the keys of a group are read from memory once for many of them.
pub(super) const TILE_ROWS: usize = 24;
/// Panels of a group: what the softmax is carried on by.
pub(super) const TILE_PANELS: usize = 8;
/// Slots of a group.
pub(super) const GROUP_SLOTS: usize = TILE_PANELS * LANES;
/// Queries whose sums are in registers together, at most.
const CHAINS_MAX: usize = 12;
/// Elements from one query to the next. A constant, so that the inner loop addresses all queries of a set from one register;
/// not a power of two, so that they do not fall into the same lines of the cache.
const QUERY_STRIDE: usize = HEAD_DIM_MAX + LANES;
/// Elements of a head, at most.
pub(super) const HEAD_DIM_MAX: usize = 256;

/// The queries of a tile and room for their scores.
#[derive(Debug, Default)]
pub(super) struct Tile {
    head_dim: usize,
    /// Sets of queries that are computed together; see [`Tile::start`].
    sets: Vec<Set>,
    /// Scale included.
    queries: Vec<[f32; QUERY_STRIDE]>,
    /// Visible slots of each row: from the first on, to before the second.
    visible: Vec<(usize, usize)>,
    /// Scores, then weights, of one set: `[rows][panels][lanes]`.
    scores: Vec<[Chunk<f32>; TILE_PANELS]>,
}

/// Queries `first..first + rows` of a tile.
#[derive(Clone, Copy, Debug)]
struct Set {
    first: usize,
    rows: usize,
}

/// The keys and values of a group. Panels past the last visible slot are empty.
pub(super) struct Panels<'a, T> {
    /// `[head_dim]` chunks each.
    pub(super) keys: [&'a [Chunk<T>]; TILE_PANELS],
    /// `[LANES][value chunks]` each.
    pub(super) values: [&'a [Chunk<T>]; TILE_PANELS],
    /// Lanes that are tokens: fewer than 16 where a block ends.
    pub(super) tokens: [usize; TILE_PANELS],
}

impl<T> Default for Panels<'_, T> {
    fn default() -> Self {
        Self { keys: [&[]; TILE_PANELS], values: [&[]; TILE_PANELS], tokens: [0; TILE_PANELS] }
    }
}

/// The online softmax of a tile's rows so far.
#[derive(Debug, Default)]
pub(super) struct Running {
    /// Chunks of one row's values.
    width: usize,
    /// Rows in use.
    rows: usize,
    /// Largest score; -inf before the first key.
    largest: Vec<f32>,
    /// Sums of the weights, lane by lane.
    sums: Vec<Chunk<f32>>,
    /// Sums of weight times value, `[rows][width]`.
    values: Vec<Chunk<f32>>,
}

impl Running {
    /// Makes room for a tile with `value_row` elements per value.
    pub(super) fn reserve(&mut self, value_row: usize) {
        self.width = value_row / LANES;
        self.largest.resize(TILE_ROWS, 0.0);
        self.sums.resize(TILE_ROWS, [0.0; LANES]);
        self.values.resize(TILE_ROWS * self.width, [0.0; LANES]);
    }

    /// Forgets everything.
    #[inline(always)]
    pub(super) fn start(&mut self, rows: usize) {
        self.rows = rows;
        self.largest[..rows].fill(f32::NEG_INFINITY);
        self.sums[..rows].fill([0.0; LANES]);
        self.values[..rows * self.width].fill([0.0; LANES]);
    }

    /// Continues with the keys that `later` has seen.
    #[inline(always)]
    pub(super) fn join<S: Simd>(&mut self, simd: S, later: &Self) {
        for row in 0..self.rows {
            let (mine, its) = (self.largest[row], later.largest[row]);
            let values = row * self.width..(row + 1) * self.width;
            if its == f32::NEG_INFINITY {
                continue;
            }
            if mine == f32::NEG_INFINITY {
                self.largest[row] = its;
                self.sums[row] = later.sums[row];
                self.values[values.clone()].copy_from_slice(&later.values[values]);
                continue;
            }
            let largest = if its > mine { its } else { mine };
            let old = exp_to_88(simd, simd.splat(mine - largest));
            let new = exp_to_88(simd, simd.splat(its - largest));
            self.largest[row] = largest;
            let mine = std::iter::once(&mut self.sums[row]).chain(&mut self.values[values.clone()]);
            let its = std::iter::once(&later.sums[row]).chain(&later.values[values]);
            for (a, b) in mine.zip(its) {
                simd.store(simd.mul_add(simd.load(b), new, simd.mul(simd.load(a), old)), a);
            }
        }
    }

    /// The row's attention: values by the sum of the weights.
    #[inline(always)]
    pub(super) fn write<S: Simd>(&self, simd: S, row: usize, out: &mut [f32]) {
        let total = simd.splat(simd.sum(simd.load(&self.sums[row])));
        for (value, out) in self.values[row * self.width..].iter().zip(out.chunks_mut(LANES)) {
            store_part(simd, simd.div(simd.load(value), total), out);
        }
    }
}

impl Tile {
    /// Makes room for a tile.
    pub(super) fn reserve(&mut self) {
        self.sets.clear();
        self.sets.reserve(TILE_ROWS);
        self.queries.resize(TILE_ROWS, [0.0; QUERY_STRIDE]);
        self.visible.resize(TILE_ROWS, (0, 0));
        self.scores.resize(CHAINS_MAX, [[0.0; LANES]; TILE_PANELS]);
    }

    /// Begins a tile of `rows` queries and cuts it into sets of the sizes that there are inner loops for, large ones first.
    #[inline(always)]
    pub(super) fn start<S: Simd>(&mut self, rows: usize, head_dim: usize) {
        self.head_dim = head_dim;
        self.sets.clear();
        let mut first = 0;
        for size in [CHAINS_MAX, 6, 4, 3, 2, 1] {
            while rows - first >= size && (S::WIDE || size < CHAINS_MAX) {
                self.sets.push(Set { first, rows: size });
                first += size;
            }
        }
    }

    /// Sets one query and the slots it sees.
    #[inline(always)]
    pub(super) fn set_query<S: Simd>(
        &mut self,
        simd: S,
        query: usize,
        elements: &[f32],
        scale: f32,
        visible: (usize, usize),
    ) {
        self.visible[query] = visible;
        let scale = simd.splat(scale);
        for (to, elements) in self.queries[query].chunks_mut(LANES).zip(elements.chunks(LANES)) {
            store_part(simd, simd.mul(load_part(simd, elements), scale), to);
        }
    }

    /// Attends to the slots `base..base + GROUP_SLOTS`, and asks for the keys that come `next`.
    #[inline(always)]
    pub(super) fn attend<S: Simd, T: Element>(
        &mut self,
        simd: S,
        panels: &Panels<'_, T>,
        next: &Panels<'_, T>,
        base: usize,
        running: &mut Running,
    ) {
        for i in 0..self.sets.len() {
            let set = self.sets[i];
            let group = Group { tile: self, panels, next, base, running, set };
            // (queries, panels scored together, value chunks added together): what fills the registers with chains of
            // additions that do not wait for each other.
            match (S::WIDE, set.rows) {
                (true, 12) => simd.call(SetOf::<T, 12, 2, 2>(group)),
                (true, 6) => simd.call(SetOf::<T, 6, 4, 4>(group)),
                (true, 4) => simd.call(SetOf::<T, 4, 4, 4>(group)),
                (true, 3) => simd.call(SetOf::<T, 3, 4, 4>(group)),
                (true, 2) => simd.call(SetOf::<T, 2, 4, 4>(group)),
                (true, _) => simd.call(SetOf::<T, 1, 8, 4>(group)),
                (false, 6) => simd.call(SetOf::<T, 6, 1, 1>(group)),
                (false, 4) => simd.call(SetOf::<T, 4, 1, 1>(group)),
                (false, 3) => simd.call(SetOf::<T, 3, 1, 2>(group)),
                (false, 2) => simd.call(SetOf::<T, 2, 2, 2>(group)),
                (false, _) => simd.call(SetOf::<T, 1, 2, 4>(group)),
            }
        }
    }
}

/// One set of queries and one group of panels.
struct Group<'a, 'b, T> {
    tile: &'a mut Tile,
    panels: &'a Panels<'b, T>,
    next: &'a Panels<'b, T>,
    /// The group's first slot.
    base: usize,
    running: &'a mut Running,
    set: Set,
}

/// [`Tile::attend`] for a set of `M` queries, `P` panels and `C` value chunks at a time.
struct SetOf<'a, 'b, T, const M: usize, const P: usize, const C: usize>(Group<'a, 'b, T>);

impl<T: Element, const M: usize, const P: usize, const C: usize> Kernel for SetOf<'_, '_, T, M, P, C> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Group { tile, panels, next, base, running, set } = self.0;
        let mut visible = [(0, 0); M];
        for (visible, slots) in visible.iter_mut().zip(&tile.visible[set.first..]) {
            *visible = (slots.0.clamp(base, base + GROUP_SLOTS) - base, slots.1.clamp(base, base + GROUP_SLOTS) - base);
        }
        // Later rows see later slots, at both ends.
        let (oldest, newest) = (visible[0].0, visible[M - 1].1);
        if oldest >= newest {
            return;
        }
        let queries: &[_; M] = tile.queries[set.first..].first_chunk().expect("room for all rows of a tile");
        let scores: &mut [_; M] = tile.scores.first_chunk_mut().expect("room for the largest set");
        let (mut panel, end) = (oldest / LANES, newest.div_ceil(LANES));
        while panel + P <= end {
            score::<S, T, M, P>(simd, (queries, tile.head_dim), panels, panel, scores);
            panel += P;
        }
        while panel < end {
            score::<S, T, M, 1>(simd, (queries, tile.head_dim), panels, panel, scores);
            panel += 1;
        }
        soften(simd, scores, &visible, &panels.tokens, (running, set.first));
        let width = running.width;
        let values = &mut running.values[set.first * width..][..M * width];
        add_values::<S, T, M, C>(simd, scores, (panels, next), &visible, values);
    }
}

/// `scores[m][first + p] = q_m . keys`, for `P` panels from `first` on: one chain of multiply-adds over the head's elements
/// for each query and key. Beside it, asks for the panels' values, which are read next.
#[inline(always)]
fn score<S: Simd, T: Element, const M: usize, const P: usize>(
    simd: S,
    (queries, head_dim): (&[[f32; QUERY_STRIDE]; M], usize),
    panels: &Panels<'_, T>,
    first: usize,
    scores: &mut [[Chunk<f32>; TILE_PANELS]; M],
) {
    let head_dim = head_dim.min(HEAD_DIM_MAX);
    let mut keys = [&[] as &[Chunk<T>]; P];
    for (keys, panel) in keys.iter_mut().zip(&panels.keys[first..]) {
        *keys = &panel[..head_dim];
    }
    let mut values = [std::ptr::null(); P];
    for (values, panel) in values.iter_mut().zip(&panels.values[first..]) {
        *values = panel.as_ptr();
    }
    let mut sums = [[simd.splat(0.0); P]; M];
    for i in 0..head_dim {
        let mut key = [simd.splat(0.0); P];
        for p in 0..P {
            key[p] = T::load(simd, &keys[p][i]);
            ask(values[p].wrapping_add(i));
        }
        for m in 0..M {
            let q = simd.splat(queries[m][i]);
            for p in 0..P {
                sums[m][p] = simd.mul_add(q, key[p], sums[m][p]);
            }
        }
    }
    for m in 0..M {
        for p in 0..P {
            simd.store(sums[m][p], &mut scores[m][first + p]);
        }
    }
}

/// Turns the scores of `M` rows into weights relative to each row's largest so far, and brings what was summed before to the
/// same scale. Lanes outside `visible` become 0 and are not counted; a row that sees nothing of the group, whose range is empty at
/// one of the group's ends, keeps what it has.
///
/// All rows go through each stage together: one row's largest score takes long to find but keeps few units busy, and whether
/// it is a new largest is not foreseeable.
#[inline(always)]
fn soften<S: Simd, const M: usize>(
    simd: S,
    scores: &mut [[Chunk<f32>; TILE_PANELS]; M],
    visible: &[(usize, usize); M],
    tokens: &[usize; TILE_PANELS],
    (running, first): (&mut Running, usize),
) {
    let mut found = [f32::NEG_INFINITY; LANES];
    for row in 0..M {
        found[row] = largest_visible(simd, &mut scores[row], visible[row], tokens);
    }
    let largest = &mut running.largest[first..first + M];
    let before = load_part(simd, largest);
    // In this order a NaN that was found is passed over; its row becomes NaN by its weight.
    let after = simd.max(simd.load(&found), before);
    let same = simd.at_least(before, after);
    if simd.bits(same) != (1 << LANES) - 1 {
        store_part(simd, after, largest);
        let mut scale = [0.0; LANES];
        simd.store(simd.select(same, simd.splat(1.0), exp_to_88(simd, simd.sub(before, after))), &mut scale);
        let width = running.width;
        for (row, scale) in scale[..M].iter().enumerate() {
            let (sum, scale) = (&mut running.sums[first + row], simd.splat(*scale));
            simd.store(simd.mul(simd.load(sum), scale), sum);
            for value in &mut running.values[(first + row) * width..][..width] {
                simd.store(simd.mul(simd.load(value), scale), value);
            }
        }
    }
    for row in 0..M {
        let shift = simd.splat(running.largest[first + row]);
        let mut sum = simd.load(&running.sums[first + row]);
        for score in &mut scores[row][visible[row].0 / LANES..visible[row].1.div_ceil(LANES)] {
            let weight = exp_to_88(simd, simd.sub(simd.load(score), shift));
            simd.store(weight, score);
            sum = simd.add(sum, weight);
        }
        simd.store(sum, &mut running.sums[first + row]);
    }
}

/// The largest of a row's visible scores, -inf when there is none. Lanes outside `visible` become -inf.
#[inline(always)]
fn largest_visible<S: Simd>(
    simd: S,
    scores: &mut [Chunk<f32>; TILE_PANELS],
    visible: (usize, usize),
    tokens: &[usize; TILE_PANELS],
) -> f32 {
    let nothing = simd.splat(f32::NEG_INFINITY);
    let mut largest = [nothing; 2];
    for panel in visible.0 / LANES..visible.1.div_ceil(LANES) {
        let (from, to) = lanes(visible, panel, tokens);
        let mut score = simd.load(&scores[panel]);
        if to - from < LANES {
            score = simd.select(simd.lanes(from, to), score, nothing);
            simd.store(score, &mut scores[panel]);
        }
        largest[panel & 1] = simd.max(largest[panel & 1], score);
    }
    simd.largest(simd.max(largest[0], largest[1]))
}

/// The lanes of `panel` that are tokens within `visible`.
#[inline(always)]
fn lanes(visible: (usize, usize), panel: usize, tokens: &[usize; TILE_PANELS]) -> (usize, usize) {
    let start = panel * LANES;
    let end = visible.1.min(start + tokens[panel]).saturating_sub(start);
    (visible.0.saturating_sub(start).min(end), end)
}

/// Adds weight times value to the sums of `M` rows, `[M][width]`: for each row its visible slots in order. Slots that all rows
/// see are done for all rows together; those before and after them only for the rows that do.
#[inline(always)]
fn add_values<S: Simd, T: Element, const M: usize, const C: usize>(
    simd: S,
    weights: &[[Chunk<f32>; TILE_PANELS]; M],
    (panels, next): (&Panels<'_, T>, &Panels<'_, T>),
    visible: &[(usize, usize); M],
    values: &mut [Chunk<f32>],
) {
    let width = values.len() / M;
    let common = (visible[M - 1].0, visible[0].1);
    let all = common.0 < common.1;
    for row in 0..M {
        let (first, end) = visible[row];
        let slots = (first, if all { common.0 } else { end });
        if slots.0 < slots.1 {
            let values = &mut values[row * width..(row + 1) * width];
            simd.call(AddRow { weights: &weights[row], panels, next, slots, values });
        }
    }
    if !all {
        return;
    }
    add_chunks::<S, T, M, C>(simd, weights, (panels, next), common, values);
    for row in 0..M {
        let slots = (common.1, visible[row].1);
        if slots.0 < slots.1 {
            let values = &mut values[row * width..(row + 1) * width];
            simd.call(AddRow { weights: &weights[row], panels, next, slots, values });
        }
    }
}

/// [`add_values`] for one row's `slots`.
struct AddRow<'a, 'b, T> {
    weights: &'a [Chunk<f32>; TILE_PANELS],
    panels: &'a Panels<'b, T>,
    next: &'a Panels<'b, T>,
    slots: (usize, usize),
    values: &'a mut [Chunk<f32>],
}

impl<T: Element> Kernel for AddRow<'_, '_, T> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { weights, panels, next, slots, values } = self;
        add_chunks::<S, T, 1, 4>(simd, std::array::from_ref(weights), (panels, next), slots, values);
    }
}

/// [`add_values`] for slots that all `M` rows see, `C` chunks of the values at a time.
#[inline(always)]
fn add_chunks<S: Simd, T: Element, const M: usize, const C: usize>(
    simd: S,
    weights: &[[Chunk<f32>; TILE_PANELS]; M],
    (panels, next): (&Panels<'_, T>, &Panels<'_, T>),
    slots: (usize, usize),
    values: &mut [Chunk<f32>],
) {
    let width = values.len() / M;
    let mut chunk = 0;
    while chunk + C <= width {
        add_some::<S, T, M, C>(simd, weights, (panels, next), slots, (values, chunk));
        chunk += C;
    }
    while chunk < width {
        add_some::<S, T, M, 1>(simd, weights, (panels, next), slots, (values, chunk));
        chunk += 1;
    }
}

/// [`add_chunks`] for the chunks from `chunk` on.
#[inline(always)]
fn add_some<S: Simd, T: Element, const M: usize, const C: usize>(
    simd: S,
    weights: &[[Chunk<f32>; TILE_PANELS]; M],
    (panels, next): (&Panels<'_, T>, &Panels<'_, T>),
    slots: (usize, usize),
    (values, chunk): (&mut [Chunk<f32>], usize),
) {
    let width = values.len() / M;
    let mut sums = [[simd.splat(0.0); C]; M];
    for m in 0..M {
        for c in 0..C {
            sums[m][c] = simd.load(&values[m * width + chunk + c]);
        }
    }
    #[expect(clippy::needless_range_loop, reason = "several arrays are indexed alike")]
    for panel in slots.0 / LANES..slots.1.div_ceil(LANES) {
        let (first, end) = lanes(slots, panel, &panels.tokens);
        #[expect(clippy::needless_range_loop, reason = "several arrays are indexed alike")]
        for lane in first..end {
            let place = lane * width + chunk;
            let row: &[Chunk<T>; C] = panels.values[panel][place..].first_chunk().expect("a whole row");
            // As many bytes of keys as are read of values: a panel has as much of both.
            for c in (0..C).step_by(LINE.div_ceil(size_of::<Chunk<T>>())) {
                ask(next.keys[panel].as_ptr().wrapping_add(place + c));
            }
            let mut value = [simd.splat(0.0); C];
            for c in 0..C {
                value[c] = T::load(simd, &row[c]);
            }
            for m in 0..M {
                let weight = simd.splat(weights[m][panel][lane]);
                for c in 0..C {
                    sums[m][c] = simd.mul_add(weight, value[c], sums[m][c]);
                }
            }
        }
    }
    for m in 0..M {
        for c in 0..C {
            simd.store(sums[m][c], &mut values[m * width + chunk + c]);
        }
    }
}
