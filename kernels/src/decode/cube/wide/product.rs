//! The product of two matrices whose rows lie along the sum, for a cube that has some tiles of it.
//!
//! The cube copies a piece of all its rows into shared memory, and its planes multiply tiles there;
//! the next two pieces are on their way meanwhile.

use cubecl::cmma;
use cubecl::prelude::*;

use super::TILE;

/// Vectors of a row that are in shared memory at a time, at most.
const CHUNK: usize = 8;

/// Compile-time sizes of a cube's part of `a · bᵀ`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Tiles {
    /// Lanes of a plane.
    pub plane: usize,
    /// Elements of a vector of 16 bytes.
    pub vector: usize,
    /// Elements of a row.
    pub depth: usize,
    /// Rows of `a`; a cube's rows beyond them are the last one.
    pub rows: usize,
    /// Tiles of rows of `a`, and of `b`, of a cube: one or two of `b`.
    pub tall: usize,
    pub blocks: usize,
    /// Planes that share a tile's sum.
    pub split: usize,
    /// Whether tiles go to tensor cores.
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

/// Reads a unit's vectors of a piece of `tiles` tiles of rows, from row `first` on; after each tile
/// it goes on `jump` rows further down.
#[cube]
fn read<W: Float, V: Size>(
    from: &[Vector<W, V>],
    into: &mut Array<Vector<W, V>>,
    first: usize,
    jump: usize,
    last: usize,
    piece: usize,
    #[comptime] tiles: usize,
    #[comptime] t: Tiles,
) {
    let chunk = comptime!(t.chunk());
    let vectors = comptime!(t.depth / t.vector);
    let pieces = comptime!(vectors / chunk);
    let piece = min(piece, comptime!(pieces - 1).runtime());
    #[unroll]
    for i in 0..comptime!(t.copies(tiles)) {
        let place = comptime!(i * t.units()) + UNIT_POS as usize;
        let place = min(place, comptime!(tiles * TILE * chunk - 1).runtime());
        let row = place / chunk;
        let row = first + row / TILE * jump + row % TILE;
        into[i] = from[min(row, last) * vectors + piece * chunk + place % chunk];
    }
}

/// Puts what [`read`] has read into shared memory.
#[cube]
fn write<W: Float, V: Size>(
    from: &Array<Vector<W, V>>,
    into: &mut Shared<[Vector<W, V>]>,
    #[comptime] tiles: usize,
    #[comptime] t: Tiles,
) {
    let chunk = comptime!(t.chunk());
    #[unroll]
    for i in 0..comptime!(t.copies(tiles)) {
        let place = comptime!(i * t.units()) + UNIT_POS as usize;
        if place < comptime!(tiles * TILE * chunk) {
            into[place / chunk * comptime!(t.pitch()) + place % chunk] = from[i];
        }
    }
}

/// Sums of a plane for one tile of `a` and one or two of `b`.
#[derive(CubeType)]
struct Sums {
    tiles: Sequence<cmma::Matrix<f32>>,
    /// The same where there are no tensor cores: the lane's numbers.
    plain: Array<f32>,
}

#[cube]
fn zero() -> cmma::Matrix<f32> {
    cmma::Matrix::<f32>::from_value(
        cmma::MatrixIdent::Accumulator,
        TILE,
        TILE,
        TILE,
        cmma::MatrixLayout::Undefined,
        0.0f32,
    )
}

/// Reads a tile from shared memory.
#[cube]
fn tile<W: Float, V: Size>(
    from: &Shared<[Vector<W, V>]>,
    at: usize,
    #[comptime] ident: cmma::MatrixIdent,
    #[comptime] t: Tiles,
) -> cmma::Matrix<W> {
    let layout = comptime!(match ident {
        cmma::MatrixIdent::A => cmma::MatrixLayout::RowMajor,
        _ => cmma::MatrixLayout::ColMajor,
    });
    // SAFETY: it is loaded in the next line.
    let mut tile = unsafe { cmma::Matrix::<W>::uninitialized(ident, TILE, TILE, TILE, layout) };
    let end = from.len();
    cmma::load(
        &mut tile,
        &from[at..end],
        comptime!((t.pitch() * t.vector) as u32).runtime(),
    );
    tile
}

/// Adds the products of a piece in shared memory.
#[cube]
fn add<W: Float, V: Size>(
    a: &Shared<[Vector<W, V>]>,
    b: &Shared<[Vector<W, V>]>,
    sums: &mut Sums,
    #[comptime] t: Tiles,
) {
    let plane = UNIT_POS as usize / comptime!(t.plane);
    let lane = UNIT_POS as usize % comptime!(t.plane);
    let pitch = comptime!(t.pitch());
    let a_row = plane % comptime!(t.tall) * comptime!(TILE * pitch);
    let each = comptime!(t.chunk() / t.split);
    let start = plane / comptime!(t.tall) * each;
    if t.tensor {
        #[unroll]
        for i in 0..comptime!(each * t.vector / TILE) {
            let at = start + comptime!(i * TILE / t.vector);
            let left = tile(a, a_row + at, cmma::MatrixIdent::A, t);
            #[unroll]
            for j in 0..t.blocks {
                let right = tile(b, comptime!(j * TILE * pitch) + at, cmma::MatrixIdent::B, t);
                cmma::execute(&left, &right, &sums.tiles[j], &sums.tiles[j]);
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
                for e in 0..V::value() {
                    sum = fma(
                        f32::cast_from(x.extract(e)),
                        f32::cast_from(y.extract(e)),
                        sum,
                    );
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
pub(super) fn product<W: Float, V: Size>(
    a: &[Vector<W, V>],
    b: &[Vector<W, V>],
    out: &mut Shared<[f32]>,
    a_row: usize,
    b_row: usize,
    b_jump: usize,
    #[comptime] t: Tiles,
) {
    let pieces = comptime!(t.depth / t.vector / t.chunk());
    let rows = comptime!(TILE * t.pitch());
    let mut a_here = Shared::<[Vector<W, V>]>::new_slice(comptime!(t.tall * rows));
    let mut b_here = Shared::<[Vector<W, V>]>::new_slice(comptime!(t.blocks * rows));
    let mut a_even = Array::<Vector<W, V>>::new(comptime!(t.copies(t.tall)));
    let mut a_odd = Array::<Vector<W, V>>::new(comptime!(t.copies(t.tall)));
    let mut b_even = Array::<Vector<W, V>>::new(comptime!(t.copies(t.blocks)));
    let mut b_odd = Array::<Vector<W, V>>::new(comptime!(t.copies(t.blocks)));
    let a_last = comptime!(t.rows - 1).runtime();
    let b_last = b_row + b_jump * comptime!(t.blocks - 1) + comptime!(TILE - 1);
    let mut sums = Sums {
        tiles: Sequence::new(),
        plain: Array::new(comptime!(t.blocks * TILE * TILE / t.plane)),
    };
    if t.tensor {
        #[unroll]
        for _ in 0..t.blocks {
            sums.tiles.push(zero());
        }
    } else {
        for i in 0..comptime!(t.blocks * TILE * TILE / t.plane) {
            sums.plain[i] = 0.0f32;
        }
    }
    read(a, &mut a_even, a_row, TILE, a_last, 0usize, t.tall, t);
    read(b, &mut b_even, b_row, b_jump, b_last, 0usize, t.blocks, t);
    read(a, &mut a_odd, a_row, TILE, a_last, 1usize, t.tall, t);
    read(b, &mut b_odd, b_row, b_jump, b_last, 1usize, t.blocks, t);
    for pair in 0..comptime!(pieces / 2) {
        let piece = 2 * pair;
        write(&a_even, &mut a_here, t.tall, t);
        write(&b_even, &mut b_here, t.blocks, t);
        sync_cube();
        read(a, &mut a_even, a_row, TILE, a_last, piece + 2, t.tall, t);
        read(
            b,
            &mut b_even,
            b_row,
            b_jump,
            b_last,
            piece + 2,
            t.blocks,
            t,
        );
        add(&a_here, &b_here, &mut sums, t);
        sync_cube();
        write(&a_odd, &mut a_here, t.tall, t);
        write(&b_odd, &mut b_here, t.blocks, t);
        sync_cube();
        read(a, &mut a_odd, a_row, TILE, a_last, piece + 3, t.tall, t);
        read(b, &mut b_odd, b_row, b_jump, b_last, piece + 3, t.blocks, t);
        add(&a_here, &b_here, &mut sums, t);
        sync_cube();
    }
    if comptime!(pieces % 2 == 1) {
        write(&a_even, &mut a_here, t.tall, t);
        write(&b_even, &mut b_here, t.blocks, t);
        sync_cube();
        add(&a_here, &b_here, &mut sums, t);
    }
    let square = comptime!(TILE * TILE);
    let own = UNIT_POS as usize / comptime!(t.plane) * comptime!(t.blocks * square);
    if t.tensor {
        #[unroll]
        for j in 0..t.blocks {
            let at = own + comptime!(j * square);
            cmma::store(
                &mut out[at..at + square],
                &sums.tiles[j],
                comptime!(TILE as u32).runtime(),
                cmma::MatrixLayout::RowMajor,
            );
        }
    } else {
        let lane = UNIT_POS as usize % comptime!(t.plane);
        for i in 0..comptime!(t.blocks * square / t.plane) {
            out[own + i * comptime!(t.plane) + lane] = sums.plain[i];
        }
    }
    sync_cube();
}

/// The number at `place` of tile `(i, j)` that [`product`] left.
#[cube]
pub(super) fn number(
    out: &Shared<[f32]>,
    i: usize,
    #[comptime] j: usize,
    place: usize,
    #[comptime] t: Tiles,
) -> f32 {
    let square = comptime!(TILE * TILE);
    let mut sum = 0.0f32;
    #[unroll]
    for s in 0..t.split {
        sum += out[((comptime!(s * t.tall) + i) * comptime!(t.blocks) + j) * square + place];
    }
    sum
}
