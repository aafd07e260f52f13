//! The product of two matrices whose rows lie along the sum, for a cube that has some tiles of it.
//!
//! The cube copies a piece of all its rows into shared memory, and its planes multiply tiles there;
//! the next few pieces are on their way meanwhile.

use cubecl::prelude::*;

use super::TILE;
use crate::cube::words::{Words, number as word_number};

/// Sixteen bytes of the inputs.
pub(super) type Sixteen = Words<Const<4>>;

/// Vectors of a row that are in shared memory at a time, at most.
const CHUNK: usize = 8;

/// Compile-time sizes of a cube's part of `a · bᵀ`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Tiles {
    /// Lanes of a plane.
    pub plane: usize,
    /// Elements of a vector of 16 bytes, and whether a word of it has two of them.
    pub vector: usize,
    pub halves: bool,
    /// Elements of a row.
    pub depth: usize,
    /// Rows of `a`; a cube's rows beyond them are the last one.
    pub rows: usize,
    /// Tiles of rows of `a`, and of `b`, of a cube: one or two of `b`.
    pub tall: usize,
    pub blocks: usize,
    /// Planes that share a tile's sum.
    pub split: usize,
    /// Whether tiles go to tensor cores, as numbers in bf16.
    pub tensor: bool,
}

impl Tiles {
    /// As many planes to a tile's sum as make up eight.
    pub const fn divided(mut self) -> Self {
        let steps = self.chunk() * self.vector / TILE;
        while self.tall * self.split * 2 <= 8 && self.split * 2 <= steps {
            self.split *= 2;
        }
        self
    }

    pub const fn units(&self) -> usize {
        self.tall * self.split * self.plane
    }

    /// Numbers of the scratch that [`product`] fills.
    pub const fn sums(&self) -> usize {
        self.tall * self.split * self.blocks * TILE * TILE
    }

    /// Pieces that are on their way at a time: enough to hide how long memory takes, and no more
    /// than 24 vectors of a unit; they make up all pieces.
    const fn deep(&self) -> usize {
        let pieces = self.depth / self.vector / self.chunk();
        let copies = self.copies(self.tall) + self.copies(self.blocks);
        let mut deep = 8;
        while deep > 1 && (deep * copies > 24 || !pieces.is_multiple_of(deep)) {
            deep /= 2;
        }
        deep
    }

    /// Numbers of a cube's tiles, of one tile of `b`, for each unit.
    pub const fn numbers(&self) -> usize {
        self.tall * TILE * TILE / self.units()
    }

    /// Vectors of a row in shared memory: whole tiles, and the row in whole pieces.
    const fn chunk(&self) -> usize {
        let mut chunk = CHUNK;
        let vectors = self.depth / self.vector;
        while chunk * self.vector > TILE && !vectors.is_multiple_of(chunk) {
            chunk /= 2;
        }
        chunk
    }

    /// Vectors from a row in shared memory to the next: rows begin in other banks.
    const fn pitch(&self) -> usize {
        self.chunk() + 1
    }

    /// Vectors of a piece that a unit copies.
    const fn copies(&self, tiles: usize) -> usize {
        (tiles * TILE * self.chunk()).div_ceil(self.units())
    }
}

/// Where the rows of a cube's tiles are: a tile's begin `jump` rows below those of the one before;
/// rows beyond the last are that one.
#[derive(CubeType)]
struct Rows {
    first: usize,
    jump: usize,
    last: usize,
}

/// Reads a unit's vectors of a piece of `tiles` tiles of rows.
#[cube]
fn read(
    from: &[Sixteen],
    into: &mut Array<Sixteen>,
    rows: &Rows,
    piece: usize,
    #[comptime] slot: usize,
    #[comptime] tiles: usize,
    #[comptime] t: Tiles,
) {
    let chunk = comptime!(t.chunk());
    let vectors = comptime!(t.depth / t.vector);
    let pieces = comptime!(vectors / chunk);
    let piece = piece % pieces;
    #[unroll]
    for i in 0..comptime!(t.copies(tiles)) {
        let place = comptime!(i * t.units()) + UNIT_POS as usize;
        let place = min(place, comptime!(tiles * TILE * chunk - 1).runtime());
        let row = place / chunk;
        let row = rows.first + row / TILE * rows.jump + row % TILE;
        into[comptime!(slot * t.copies(tiles) + i)] =
            from[min(row, rows.last) * vectors + piece * chunk + place % chunk];
    }
}

/// Puts what [`read`] has read into shared memory.
#[cube]
fn write(
    from: &Array<Sixteen>,
    into: &mut Shared<[Sixteen]>,
    #[comptime] slot: usize,
    #[comptime] tiles: usize,
    #[comptime] t: Tiles,
) {
    let chunk = comptime!(t.chunk());
    #[unroll]
    for i in 0..comptime!(t.copies(tiles)) {
        let place = comptime!(i * t.units()) + UNIT_POS as usize;
        if place < comptime!(tiles * TILE * chunk) {
            into[place / chunk * comptime!(t.pitch()) + place % chunk] =
                from[comptime!(slot * t.copies(tiles) + i)];
        }
    }
}

/// A shared-memory address as the instructions below take it.
#[cube]
fn address(of: *const Sixteen) -> u32 {
    let address: u32;
    gpu_asm!(
        "{{ .reg .u64 at; cvta.to.shared.u64 at, {of}; cvt.u32.u64 {address}, at; }}",
        of = in(_) of, address = out(_) address, options(nomem),
    );
    address
}

/// Four matrices of 8 × 8 numbers of 16 bits, spread over the plane as tensor cores take them; each
/// lane names the place of a row of one of them.
#[cube]
fn matrices(row: u32) -> Sixteen {
    let numbers: Sixteen;
    gpu_asm!(
        "ldmatrix.sync.aligned.m8n8.x4.shared::cta.b16 {}, [{}];",
        out(_) numbers, in(_) row,
    );
    numbers
}

/// `sum + a · b` of 16 × 16 and 16 × 8 numbers in bf16; `b` is in the words `at` and `at + 1`.
#[cube]
fn multiply(
    a: Sixteen,
    b: Sixteen,
    sum: Vector<f32, Const<4>>,
    #[comptime] at: usize,
) -> Vector<f32, Const<4>> {
    let next: Vector<f32, Const<4>>;
    gpu_asm!(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 ",
        "{next}, {{{a0}, {a1}, {a2}, {a3}}}, {{{b0}, {b1}}}, {{{c0}, {c1}, {c2}, {c3}}};",
        next = out(_) next,
        a0 = in(_) a.extract(0usize), a1 = in(_) a.extract(1usize),
        a2 = in(_) a.extract(2usize), a3 = in(_) a.extract(3usize),
        b0 = in(_) b.extract(at), b1 = in(_) b.extract(comptime!(at + 1)),
        c0 = in(_) sum.extract(0usize), c1 = in(_) sum.extract(1usize),
        c2 = in(_) sum.extract(2usize), c3 = in(_) sum.extract(3usize),
        options(nomem),
    );
    next
}

/// Sums of a plane for one tile of `a` and one or two of `b`: of the lane, as [`multiply`] spreads
/// them, eight columns after the other; or, without tensor cores, every so many numbers one.
#[derive(CubeType)]
struct Sums {
    spread: Array<Vector<f32, Const<4>>>,
    plain: Array<f32>,
}

/// Adds the products of a piece in shared memory.
#[cube]
fn add(a: &Shared<[Sixteen]>, b: &Shared<[Sixteen]>, sums: &mut Sums, #[comptime] t: Tiles) {
    let plane = UNIT_POS as usize / comptime!(t.plane);
    let lane = UNIT_POS as usize % comptime!(t.plane);
    let pitch = comptime!(t.pitch());
    let a_row = plane % comptime!(t.tall) * comptime!(TILE * pitch);
    let each = comptime!(t.chunk() / t.split);
    let start = plane / comptime!(t.tall) * each;
    if t.tensor {
        // Rows 0-7 and 8-15 of the first eight numbers of the sum, then of the second; of `b`, the
        // first and second eight numbers of rows 0-7, then of rows 8-15.
        let a_at = a_row + lane % 16 * pitch + lane / 16 + start;
        let b_at = (lane / 16 * 8 + lane % 8) * pitch + lane / 8 % 2 + start;
        let a_from = address(a.as_ptr()) + (a_at * 16) as u32;
        let b_from = address(b.as_ptr()) + (b_at * 16) as u32;
        #[unroll]
        for i in 0..comptime!(each / 2) {
            let left = matrices(a_from + comptime!(i as u32 * 32));
            #[unroll]
            for j in 0..t.blocks {
                let right = matrices(b_from + comptime!((j * TILE * pitch * 16 + i * 32) as u32));
                #[unroll]
                for half in 0..2usize {
                    let at = comptime!(2 * j + half);
                    sums.spread[at] = multiply(left, right, sums.spread[at], comptime!(2 * half));
                }
            }
        }
    } else {
        for i in 0..comptime!(t.blocks * TILE * TILE / t.plane) {
            let place = i * comptime!(t.plane) + lane;
            let left = a_row + place % comptime!(TILE * TILE) / TILE * pitch;
            let right = (place / comptime!(TILE * TILE) * TILE + place % TILE) * pitch;
            let mut sum = sums.plain[i];
            for k in 0..each {
                let x = a[left + start + k];
                let y = b[right + start + k];
                #[unroll]
                for e in 0..comptime!(t.vector) {
                    let (p, q) = (word_number(x, e, t.halves), word_number(y, e, t.halves));
                    sum = fma(p, q, sum);
                }
            }
            sums.plain[i] = sum;
        }
    }
}

/// The tiles of `a · bᵀ` of a cube, in parts: tile `(i, j)` is the sum over `s` of the numbers of
/// `out` from `((s · tall + i) · blocks + j) · 256` on, row by row. The cube is synchronised after it.
///
/// The rows of `a` begin at `a_row`, those of `b` at `b_row`; its second tile's are `b_jump` rows
/// below the first's.
#[cube]
pub(super) fn product(
    a: &[Sixteen],
    b: &[Sixteen],
    out: &mut Shared<[f32]>,
    a_row: usize,
    b_row: usize,
    b_jump: usize,
    #[comptime] t: Tiles,
) {
    let pieces = comptime!(t.depth / t.vector / t.chunk());
    let rows = comptime!(TILE * t.pitch());
    let mut a_here = Shared::<[Sixteen]>::new_slice(comptime!(t.tall * rows));
    let mut b_here = Shared::<[Sixteen]>::new_slice(comptime!(t.blocks * rows));
    let deep = comptime!(t.deep());
    let mut a_next = Array::<Sixteen>::new(comptime!(deep * t.copies(t.tall)));
    let mut b_next = Array::<Sixteen>::new(comptime!(deep * t.copies(t.blocks)));
    let of_a = Rows {
        first: a_row,
        jump: TILE.runtime(),
        last: comptime!(t.rows - 1).runtime(),
    };
    let of_b = Rows {
        first: b_row,
        jump: b_jump,
        last: b_row + b_jump * comptime!(t.blocks - 1) + comptime!(TILE - 1),
    };
    let mut sums = Sums {
        spread: Array::new(comptime!(2 * t.blocks)),
        plain: Array::new(comptime!(t.blocks * TILE * TILE / t.plane)),
    };
    if t.tensor {
        #[unroll]
        for i in 0..comptime!(2 * t.blocks) {
            sums.spread[i] = Vector::new(0.0f32);
        }
    } else {
        for i in 0..comptime!(t.blocks * TILE * TILE / t.plane) {
            sums.plain[i] = 0.0f32;
        }
    }
    // Cubes begin at different pieces: they do not all ask for the same rows of `a` at a time.
    let begin = CUBE_POS % pieces;
    #[unroll]
    for slot in 0..deep {
        let piece = begin + slot;
        read(a, &mut a_next, &of_a, piece, slot, t.tall, t);
        read(b, &mut b_next, &of_b, piece, slot, t.blocks, t);
    }
    for round in 0..comptime!(pieces / deep) {
        #[unroll]
        for slot in 0..deep {
            write(&a_next, &mut a_here, slot, t.tall, t);
            write(&b_next, &mut b_here, slot, t.blocks, t);
            sync_cube();
            if round + 1 < comptime!(pieces / deep) {
                let piece = begin + (round + 1) * deep + slot;
                read(a, &mut a_next, &of_a, piece, slot, t.tall, t);
                read(b, &mut b_next, &of_b, piece, slot, t.blocks, t);
            }
            add(&a_here, &b_here, &mut sums, t);
            sync_cube();
        }
    }
    let square = comptime!(TILE * TILE);
    let own = UNIT_POS as usize / comptime!(t.plane) * comptime!(t.blocks * square);
    let lane = UNIT_POS as usize % comptime!(t.plane);
    if t.tensor {
        #[unroll]
        for i in 0..comptime!(2 * t.blocks) {
            let at = own + comptime!(i / 2 * square + i % 2 * 8) + lane / 4 * TILE + lane % 4 * 2;
            #[unroll]
            for k in 0..4usize {
                out[at + comptime!(k / 2 * 8 * TILE + k % 2)] = sums.spread[i].extract(k);
            }
        }
    } else {
        for i in 0..comptime!(t.blocks * square / t.plane) {
            out[own + i * comptime!(t.plane) + lane] = sums.plain[i];
        }
    }
    sync_cube();
}

/// The row of `a`, within the cube's, of the unit's number `i` of what [`product`] leaves.
#[cube]
pub(super) fn row(i: usize, #[comptime] t: Tiles) -> usize {
    place(i, t) / TILE
}

/// Its row of `b`, within a tile.
#[cube]
pub(super) fn column(i: usize, #[comptime] t: Tiles) -> usize {
    place(i, t) % TILE
}

/// The unit's number `i` of those that [`product`] has left of tile `j` of `b`.
#[cube]
pub(super) fn number(
    out: &Shared<[f32]>,
    i: usize,
    #[comptime] j: usize,
    #[comptime] t: Tiles,
) -> f32 {
    let square = comptime!(TILE * TILE);
    let tile = place(i, t) / square;
    let within = place(i, t) % square;
    let mut sum = 0.0f32;
    #[unroll]
    for s in 0..t.split {
        sum += out[((comptime!(s * t.tall) + tile) * comptime!(t.blocks) + j) * square + within];
    }
    sum
}

#[cube]
fn place(i: usize, #[comptime] t: Tiles) -> usize {
    i * comptime!(t.units()) + UNIT_POS as usize
}
