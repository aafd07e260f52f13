//! What CubeCL's allocator makes of a training step on a GPU.
//!
//! It cuts tensors from pages of one size, each at the first gap that is large enough, and gives no
//! page back while the run lasts. How much room is lost between tensors depends on the order in which
//! they come and go, and on the size of the pages: from 1 % to a third. So the step is gone through
//! allocation by allocation, in the order of `kernels/src/mamba_layer/fused.rs` and
//! `src/train/recompute.rs`, and the page size with the least loss is the one to use.
//!
//! Weights, moments and the sum of several micro-batches' gradients are in a pool of their own, without
//! loss.

/// Page sizes are multiples of this, in bytes.
const UNIT: u64 = 32 << 20;
/// The least page size: below it the allocator has many pages to look through.
const LEAST: u64 = 256 << 20;
/// Beyond this, or twice the largest tensor, pages are not worth trying.
const MOST: u64 = 1280 << 20;
/// Page sizes that are tried.
const CANDIDATES: u64 = 32;
/// CubeCL makes a page this much larger than the largest tensor.
const MARGIN: u64 = 1 << 20;
/// What a page is taken to be smaller by: tensors that the model leaves out (decay rates, gradients of
/// vectors, partial sums) may be in each. A size that is as good only without them is luck.
const UNSEEN: u64 = 8 << 20;
/// Tensors begin at multiples of this.
const ALIGNMENT: u64 = 512;

/// Sizes of the tensors of a training step, in bytes; and its course.
#[derive(Clone, Debug)]
pub(super) struct Step {
    /// The residual stream, `[B, L, D]`, f32.
    pub stream: u64,
    /// `[B, L, D]` in the computation's format.
    pub outer: u64,
    /// One statistic a row, f32.
    pub statistics: u64,
    /// `[B, L, 2E]`.
    pub projected: u64,
    /// `[B, L, E]`.
    pub inner: u64,
    /// `[B, L, R + 2N]`.
    pub low: u64,
    /// States of the scan at chunk starts.
    pub states: u64,
    /// States between chunk starts that the scan's backward pass works with at a time, partial sums,
    /// and adjoints of chunk ends.
    pub scan: Vec<u64>,
    /// Weights of the four projections (in, x, Δ, out) in the computation's format; none in f32.
    pub casts: Option<[u64; 4]>,
    /// Gradients of the large weights of a layer, in the order of the backward pass: out, Δ, x, in.
    pub gradients: [u64; 4],
    /// Logits, f32, and in the computation's format where that is another.
    pub logits: [u64; 2],
    /// Embedding or head, f32.
    pub table: u64,
    pub layers: usize,
    /// Layers of a group; all where there are no groups.
    pub group: usize,
    /// First layers that are recomputed.
    pub recomputed: usize,
    /// Whether gradients are summed over several micro-batches, elsewhere.
    pub accumulates: bool,
}

impl Step {
    /// The page size with the least loss, and what the allocator takes with it.
    pub fn best_page(&self) -> (u64, u64) {
        let largest = self.largest() + MARGIN + UNSEEN;
        let from = largest.max(LEAST).div_ceil(UNIT);
        let to = MOST.div_ceil(UNIT).max(2 * from);
        (from..=to)
            .step_by(((to - from) / CANDIDATES).max(1) as usize)
            .map(|units| units * UNIT)
            .map(|page| (self.surely(page) * page, page))
            .min()
            .map_or((0, 0), |(reserved, page)| (page, reserved))
    }

    fn largest(&self) -> u64 {
        let [stream, projected, logits] = [self.stream, self.projected, self.logits[0]];
        let scan = self.scan.iter().copied();
        scan.fold(stream.max(projected).max(logits), u64::max)
    }

    /// The pages of the given size that the allocator takes, whether or not each has room for what the
    /// model leaves out.
    fn surely(&self, page: u64) -> u64 {
        self.pages(page).max(self.pages(page - UNSEEN))
    }

    /// The pages of the given size that the allocator takes.
    fn pages(&self, page: u64) -> u64 {
        let mut arena = Arena::new(page);
        // The second step finds the pages as the first left them.
        for _ in 0..2 {
            let gradients = self.micro_batch(&mut arena);
            arena.free_all(gradients);
        }
        arena.pages.len() as u64
    }

    /// One micro-batch; returns its gradients, but for those that went into a sum at the end of their
    /// group.
    fn micro_batch(&self, arena: &mut Arena) -> Vec<Block> {
        let groups: Vec<_> = (0..self.layers)
            .step_by(self.group)
            .map(|from| from..(from + self.group).min(self.layers))
            .collect();
        let mut stream = arena.take(self.stream);
        let mut starts = Vec::new();
        for group in &groups[..groups.len() - 1] {
            starts.push(stream);
            stream = arena.take(self.stream);
            for layer in group.clone() {
                let saved = self.forward(arena, layer);
                arena.free_all(saved);
            }
        }
        let mut gradients = Vec::new();
        let mut gradient = None;
        for group in groups.into_iter().rev() {
            let stream = match gradient {
                None => stream,
                // The start of a group is kept until its end, so its first layer needs a new one.
                Some(_) => arena.take(self.stream),
            };
            let mut saved: Vec<_> = group
                .clone()
                .map(|layer| self.forward(arena, layer))
                .collect();
            let mut own = Vec::new();
            let incoming = match gradient.take() {
                None => self.head(arena, stream, &mut own),
                Some(gradient) => {
                    arena.free(stream);
                    gradient
                }
            };
            while let Some(layer) = saved.pop() {
                self.backward(arena, layer, &mut own);
            }
            gradient = Some(incoming);
            if let Some(start) = starts.pop() {
                arena.free(start);
            }
            match self.accumulates {
                true => arena.free_all(own),
                false => gradients.extend(own),
            }
        }
        gradients.push(arena.take(self.table));
        arena.free_all(gradient);
        gradients
    }

    /// The weights of a layer's products in the computation's format.
    fn rounded_weights(&self, arena: &mut Arena) -> Vec<Block> {
        let casts = self.casts.iter().flatten();
        casts.map(|bytes| arena.take(*bytes)).collect()
    }

    /// One layer forward; returns what it keeps, `xz` last if at all.
    fn forward(&self, arena: &mut Arena, layer: usize) -> Vec<Block> {
        let mut kept = vec![arena.take(self.outer), arena.take(self.statistics)];
        let normed = arena.take(self.outer);
        let weights = self.rounded_weights(arena);
        let xz = arena.take(self.projected);
        arena.free(normed);
        let u = arena.take(self.inner);
        kept.push(arena.take(self.low));
        let delta = arena.take(self.inner);
        kept.push(arena.take(self.states));
        let y = arena.take(self.inner);
        arena.free_all([delta, u]);
        // The last product adds to the stream in its own buffer.
        arena.free(y);
        arena.free_all(weights);
        match layer < self.recomputed {
            true => arena.free(xz),
            false => kept.push(xz),
        }
        kept
    }

    /// Final norm, head and loss, forward and backward; returns the stream's gradient.
    fn head(&self, arena: &mut Arena, stream: Block, gradients: &mut Vec<Block>) -> Block {
        let normed = arena.take(self.stream);
        let rounded = arena.take(self.outer);
        arena.free(normed);
        let logits = arena.take(self.logits[0]);
        let dlogits = arena.take(self.logits[0]);
        arena.free(logits);
        let rounded_dlogits = arena.take(self.logits[1]);
        arena.free(dlogits);
        gradients.push(arena.take(self.table));
        let dx = arena.take(self.outer);
        arena.free_all([rounded_dlogits, rounded]);
        let dnormed = arena.take(self.stream);
        arena.free(dx);
        arena.free(dnormed);
        // The norm writes the gradient of the stream over it.
        stream
    }

    /// One layer backward, from what it kept.
    fn backward(&self, arena: &mut Arena, mut saved: Vec<Block>, gradients: &mut Vec<Block>) {
        let [out, delta, low, input] = self.gradients;
        let weights = self.rounded_weights(arena);
        if saved.len() == 4 {
            let normed = arena.take(self.outer);
            saved.push(arena.take(self.projected));
            arena.free(normed);
        }
        let dout = arena.take(if self.casts.is_some() { self.outer } else { 0 });
        let u = arena.take(self.inner);
        let step = arena.take(self.inner);
        let dy = arena.take(self.inner);
        let dxz = arena.take(self.projected);
        let dlow = arena.take(self.low);
        // The gradients of the step sizes and of u take the places of the step sizes and of dy; y is
        // in the half of dxz that is free until the convolution's backward pass.
        let scan: Vec<_> = self.scan.iter().map(|bytes| arena.take(*bytes)).collect();
        arena.free_all(scan);
        gradients.push(arena.take(out));
        arena.free(dout);
        gradients.push(arena.take(delta));
        arena.free(step);
        gradients.push(arena.take(low));
        arena.free(u);
        arena.free_all([dlow, dy]);
        let [hat, statistics, kept_low, states, xz]: [Block; 5] =
            saved.try_into().expect("what a layer keeps, and xz");
        arena.free_all([kept_low, states, xz]);
        let normed = arena.take(self.outer);
        gradients.push(arena.take(input));
        arena.free(normed);
        let dnormed = arena.take(self.outer);
        arena.free(dxz);
        // The norm writes the new gradient of the stream over the old one.
        arena.free_all([dnormed, hat, statistics]);
        arena.free_all(weights);
    }
}

/// A tensor's place: page, begin and end in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Block {
    page: usize,
    begin: u64,
    end: u64,
}

/// CubeCL's pages, and the places that are taken in them.
struct Arena {
    size: u64,
    /// Begin and end of each tensor of a page, in order.
    pages: Vec<Vec<(u64, u64)>>,
    /// The largest gap of each page.
    gaps: Vec<u64>,
}

impl Arena {
    fn new(size: u64) -> Self {
        Self {
            size,
            pages: Vec::new(),
            gaps: Vec::new(),
        }
    }

    /// A place for so many bytes, in the first gap that has them.
    fn take(&mut self, bytes: u64) -> Block {
        let bytes = bytes.next_multiple_of(ALIGNMENT);
        let page = match self.gaps.iter().position(|gap| *gap >= bytes) {
            Some(page) => page,
            None => {
                self.pages.push(Vec::new());
                self.gaps.push(self.size);
                self.pages.len() - 1
            }
        };
        let tensors = &mut self.pages[page];
        let mut begin = 0;
        let mut at = 0;
        while at < tensors.len() && tensors[at].0 - begin < bytes {
            begin = tensors[at].1;
            at += 1;
        }
        let end = begin + bytes;
        tensors.insert(at, (begin, end));
        self.measure(page);
        Block { page, begin, end }
    }

    fn free(&mut self, block: Block) {
        let place = (block.begin, block.end);
        self.pages[block.page].retain(|tensor| *tensor != place);
        self.measure(block.page);
    }

    fn free_all(&mut self, blocks: impl IntoIterator<Item = Block>) {
        for block in blocks {
            self.free(block);
        }
    }

    /// Looks for the page's largest gap.
    fn measure(&mut self, page: usize) {
        let mut largest = 0;
        let mut end = 0;
        for tensor in &self.pages[page] {
            largest = largest.max(tensor.0 - end);
            end = tensor.1;
        }
        self.gaps[page] = largest.max(self.size.saturating_sub(end));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_take_the_first_gap_that_is_large_enough() {
        let mut arena = Arena::new(10 * ALIGNMENT);
        let [a, b, c] = [4, 4, 4].map(|n| arena.take(n * ALIGNMENT));
        assert_eq!((a.page, b.page, c.page), (0, 0, 1));
        assert_eq!(arena.pages.len(), 2);
        arena.free(a);
        // The gap before b, then the one behind it.
        assert_eq!(arena.take(3 * ALIGNMENT - 1).begin, 0);
        assert_eq!(arena.take(2 * ALIGNMENT).begin, 8 * ALIGNMENT);
        assert_eq!(arena.take(ALIGNMENT).begin, 3 * ALIGNMENT);
        assert_eq!(arena.pages.len(), 2);
    }

    /// The 353M model of the paper at so many sequences of 8,192 bytes, in bf16.
    fn paper(batch: u64, recomputed: usize, scan: &[u64]) -> Step {
        let positions = batch * 8192;
        let [dim, inner, rank, state] = [1024, 2048, 64, 16];
        let low = rank + 2 * state;
        Step {
            stream: 4 * positions * dim,
            outer: 2 * positions * dim,
            statistics: 4 * positions,
            projected: 4 * positions * inner,
            inner: 2 * positions * inner,
            low: 2 * positions * low,
            states: 4 * batch * 32 * inner * state,
            scan: scan.to_vec(),
            casts: Some([
                4 * dim * inner,
                2 * inner * low,
                2 * rank * inner,
                2 * inner * dim,
            ]),
            gradients: [
                4 * inner * dim,
                4 * rank * inner,
                4 * inner * low,
                8 * dim * inner,
            ],
            logits: [1024 * positions, 512 * positions],
            table: 4 * 256 * dim,
            layers: 53,
            group: 53,
            recomputed,
            accumulates: false,
        }
    }

    /// With what `nvidia-smi` showed of runs on an H200, in GiB, less weights, moments and 0.53 GiB
    /// of context. The scan then worked with 256 MiB at a time and with three buffers `[B, L, E]` of
    /// its own, in pages of 384 MiB.
    #[test]
    fn runs_took_what_the_model_says() {
        let gib = (1u64 << 30) as f64;
        let scan = |batch: u64| {
            let unit = 4 * batch * 2048 * 16;
            let chunks = (256 << 20) / (unit * 64 + unit * 256 / 32);
            let buffer = 2 * batch * 8192 * 2048;
            let [states, sums, ends] = [64, 8, 1].map(|n| unit * n * chunks);
            [states, sums, ends, buffer, buffer, buffer]
        };
        let fixed = 12.0 * 353_945_600.0 / gib + 0.53;
        for (batch, recomputed, measured) in [(2, 0, 14.65), (4, 0, 25.53), (8, 53, 17.28)] {
            let step = paper(batch, recomputed, &scan(batch));
            let page = (384 << 20).max(step.largest() + MARGIN);
            let total = (step.pages(page) * page) as f64 / gib + fixed;
            let error = total / measured - 1.0;
            assert!(
                error.abs() < 0.035,
                "batch {batch}: {total:.2} GiB, measured {measured}"
            );
        }
    }

    #[test]
    fn the_best_page_is_no_worse_than_others() {
        let step = paper(4, 0, &[256 << 20, 32 << 20, 4 << 20]);
        let (page, reserved) = step.best_page();
        assert_eq!(step.surely(page) * page, reserved);
        for other in [288 << 20, 384 << 20, 512 << 20, 1 << 30] {
            assert!(step.surely(other) * other >= reserved, "{other}");
        }
    }

    #[test]
    fn groups_and_sums_leave_nothing_behind() {
        for group in [1, 4, 53] {
            for accumulates in [false, true] {
                let step = Step {
                    group,
                    accumulates,
                    ..paper(1, 3, &[64 << 20, 8 << 20, 1 << 20])
                };
                let mut arena = Arena::new(512 << 20);
                let gradients = step.micro_batch(&mut arena);
                arena.free_all(gradients);
                assert!(arena.pages.iter().all(Vec::is_empty), "group {group}");
            }
        }
    }
}
