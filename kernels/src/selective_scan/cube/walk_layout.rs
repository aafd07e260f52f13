//! How the [one pass](super::walk) spreads states over units, and where its numbers lie in shared memory.

use cubecl::prelude::*;

use crate::cube::wide::One;

/// States of a channel.
pub(super) const STATES: usize = 16;
/// Units that share memory's cycles.
pub(super) const PLANE: usize = 32;

/// Compile-time switches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct WalkConfig {
    pub layout: Layout,
    /// Positions of a chunk, a multiple of a tile.
    pub chunk: usize,
    /// Which of u, delta, B and C, and z are of two numbers a word.
    pub halves: [bool; 4],
    /// Whether L is a multiple of two tiles.
    pub whole: bool,
    /// Whether the step size goes through softplus.
    pub softplus: bool,
    /// Whether kernels may hold PTX.
    pub ptx: bool,
}

impl WalkConfig {
    /// Words of four numbers of u, delta and z, and of two of B and C, in the kernel's order.
    pub fn words(&self) -> [usize; 4] {
        let [u, delta, b, z] = self.halves.map(|halves| if halves { 1 } else { 2 });
        [2 * u, 2 * delta, b, 2 * z]
    }
}

/// How the states of the cube's channels are spread over its units, and where numbers lie in shared
/// memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Layout {
    /// States of a unit: four or two.
    pub own: usize,
    /// Walkers of a cube, and servers. A server has one position and four channels of a tile.
    pub half: usize,
    /// Whether units that read or write outputs together meet in no bank, which takes more room.
    pub spaced: bool,
}

impl Layout {
    /// Units that share a channel.
    pub const fn shares(&self) -> usize {
        STATES / self.own
    }

    /// Channels of a cube.
    pub const fn channels(&self) -> usize {
        self.half / self.shares()
    }

    /// Channels of a plane.
    pub const fn plane_channels(&self) -> usize {
        PLANE / self.shares()
    }

    /// Positions of a tile.
    pub const fn tile(&self) -> usize {
        4 * self.shares()
    }

    /// Positions whose B and C the servers make ready at once: each has two numbers of both.
    pub const fn bc_pitch(&self) -> usize {
        self.half / (STATES / 2)
    }

    /// Positions of a tile whose B and C a server makes ready.
    pub const fn bc_rows(&self) -> usize {
        self.tile() / self.bc_pitch()
    }

    /// From two positions' steps to the next two's, in vectors of a channel's two steps. One place is
    /// left free after eight channels.
    pub const fn step_row(&self) -> usize {
        (self.channels() + self.channels() / 8 + 5) / 8 * 8 + 2
    }

    /// Positions that a walker fetches from shared memory at once, while it works on as many others.
    /// With more, units have so many registers that a processor has room for one cube only.
    pub const fn group(&self) -> usize {
        8 / self.own
    }

    /// From a position's outputs to the next one's.
    pub const fn pitch(&self) -> usize {
        self.channels() + if self.spaced { 8 } else { 0 }
    }

    /// From a share's outputs to the next one's.
    pub const fn share_pitch(&self) -> usize {
        self.tile() * self.pitch()
            + if self.spaced {
                self.plane_channels()
            } else {
                0
            }
    }

    /// Numbers of each part of a tile's [`Room`].
    pub const fn room(&self) -> [usize; 3] {
        [
            self.tile() * self.step_row() * 2,
            self.tile() * 2 * STATES,
            self.shares() * self.share_pitch(),
        ]
    }

    /// Bytes of shared memory.
    pub const fn shared_bytes(&self) -> usize {
        let [steps, bc, sums] = self.room();
        2 * 4 * (steps + bc + sums)
    }
}

/// The cube's shared memory, for two tiles.
#[derive(CubeType)]
pub(super) struct Room {
    /// Steps, as the decays see them and times u.
    pub steps: Shared<[One]>,
    /// With four states a unit, these of B and these of C by turns, in odd positions the other way
    /// round; with two, both side by side.
    pub bc: Shared<[One]>,
    /// Every share's outputs.
    pub sums: Shared<[One]>,
}
