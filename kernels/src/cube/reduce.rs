//! Sums over the lanes of a plane and over a cube, in a fixed order: the same bits every run.

use cubecl::prelude::*;

/// Sum of `value` over groups of `lanes` (a power of two) whose numbers differ in the bits from
/// `stride` on; every lane gets the sum of its group.
#[cube]
pub(crate) fn lane_sum(value: f32, #[comptime] lanes: usize, #[comptime] stride: usize) -> f32 {
    let mut sum = value;
    let steps = comptime!(lanes.ilog2() as usize);
    #[unroll]
    for step in 0..steps {
        sum += plane_shuffle_xor(sum, comptime!((stride << step) as u32));
    }
    sum
}

/// Sum of `count` (a power of two) values, added in pairs as [`lane_sum`] adds over lanes: however
/// numbers are spread over values and lanes, in order, the sum has the same bits.
#[cube]
pub(crate) fn tree_sum(values: &mut Array<f32>, #[comptime] count: usize) -> f32 {
    let levels = comptime!(count.ilog2() as usize);
    #[unroll]
    for level in 0..levels {
        #[unroll]
        for i in 0..comptime!(count >> (level + 1)) {
            values[i] = values[comptime!(2 * i)] + values[comptime!(2 * i + 1)];
        }
    }
    values[0]
}

/// Sums `width` values at once over groups of lanes, as [`lane_sum`], and spreads the sums over
/// the group: each lane ends with the sums of some values, from [`spread_start`] on, in
/// the first places of `values`. That takes about `width` shuffles, not `width · log(lanes)`.
#[cube]
pub(crate) fn spread_sum(
    values: &mut Array<f32>,
    lane: usize,
    #[comptime] width: usize,
    #[comptime] lanes: usize,
    #[comptime] stride: usize,
) {
    let steps = comptime!(lanes.ilog2() as usize);
    #[unroll]
    for step in 0..steps {
        let mask = comptime!((stride << step) as u32);
        let half = comptime!(width >> (step + 1));
        if comptime!(half == 0) {
            values[0] += plane_shuffle_xor(values[0], mask);
        } else {
            // Each lane keeps one half of the values and hands the other to its partner.
            let upper = (lane >> comptime!(stride.ilog2() as usize + step)) % 2 == 1;
            #[unroll]
            for i in 0..half {
                let low = values[i];
                let high = values[comptime!(half + i)];
                values[i] =
                    select(upper, high, low) + plane_shuffle_xor(select(upper, low, high), mask);
            }
        }
    }
}

/// Number of the first value that a lane holds after [`spread_sum`].
#[cube]
pub(crate) fn spread_start(
    lane: usize,
    #[comptime] width: usize,
    #[comptime] lanes: usize,
    #[comptime] stride: usize,
) -> usize {
    let steps = comptime!(lanes.ilog2() as usize);
    let mut start = 0usize;
    #[unroll]
    for step in 0..steps {
        let half = comptime!(width >> (step + 1));
        if comptime!(half > 0) {
            start += ((lane >> comptime!(stride.ilog2() as usize + step)) % 2) * half;
        }
    }
    start
}

/// Sum of `count` numbers `stride` apart, from `first` on.
#[cube]
pub(crate) fn sum_strided(values: &[f32], first: usize, count: usize, stride: usize) -> f32 {
    let mut sum = 0.0f32;
    // Eight loads in flight: the sum is bound by their latency.
    for group in 0..count / 8 {
        let mut loaded = Array::<f32>::new(8usize);
        #[unroll]
        for i in 0..8usize {
            loaded[i] = values[first + (group * 8 + i) * stride];
        }
        #[unroll]
        for i in 0..8usize {
            sum += loaded[i];
        }
    }
    for i in count / 8 * 8..count {
        sum += values[first + i * stride];
    }
    sum
}

/// Sum of a vector's numbers.
#[cube]
pub(crate) fn total<N: Size>(values: Vector<f32, N>) -> f32 {
    let mut sum = 0.0f32;
    #[unroll]
    for i in 0..N::value() {
        sum += values.extract(i);
    }
    sum
}

/// `folded[i] = Σ sums[i · group ..][.. group]`, rows of `width` numbers; one unit a number.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(crate) fn fold_kernel(
    sums: &[f32],
    folded: &mut [f32],
    rows: usize,
    width: usize,
    #[comptime] group: usize,
) {
    let unit = CUBE_POS * CUBE_DIM as usize + UNIT_POS as usize;
    let row = unit / width * group;
    if row < rows {
        let count = min(comptime!(group).runtime(), rows - row);
        folded[unit] = sum_strided(sums, row * width + unit % width, count, width);
    }
}

/// `total[i] = Σ sums[row · width + i]` over the rows; one unit a number.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(crate) fn sum_rows_kernel(sums: &[f32], total: &mut [f32], rows: usize, width: usize) {
    let unit = CUBE_POS * CUBE_DIM as usize + UNIT_POS as usize;
    if unit < width {
        total[unit] = sum_strided(sums, unit, rows, width);
    }
}

/// Largest `value` over groups of lanes; see [`lane_sum`].
#[cube]
pub(crate) fn lane_max(value: f32, #[comptime] lanes: usize) -> f32 {
    let mut largest = value;
    let steps = comptime!(lanes.ilog2() as usize);
    #[unroll]
    for step in 0..steps {
        largest = max(largest, plane_shuffle_xor(largest, comptime!(1u32 << step)));
    }
    largest
}

/// Sum of `value` over the cube; every unit gets it. `scratch` has one place for each plane. All
/// units must call it together.
#[cube]
pub(crate) fn cube_sum(
    value: f32,
    scratch: &mut Shared<[f32]>,
    #[comptime] units: usize,
    #[comptime] plane: usize,
) -> f32 {
    let own = lane_sum(value, plane, 1usize);
    let unit = UNIT_POS as usize;
    // The scratch may still be read from an earlier sum.
    sync_cube();
    if unit % plane == 0 {
        scratch[unit / plane] = own;
    }
    sync_cube();
    let mut sum = 0.0f32;
    for i in 0..comptime!(units / plane) {
        sum += scratch[i];
    }
    sum
}

/// The largest `value` of the cube, and the first unit that has it; every unit gets them. `scratch` has
/// two places for each plane. All units must call it together, and may read afterwards what others
/// wrote to shared memory before.
#[cube]
pub(crate) fn cube_top(
    value: f32,
    scratch: &mut Shared<[f32]>,
    #[comptime] units: usize,
    #[comptime] plane: usize,
) -> (f32, usize) {
    let unit = UNIT_POS as usize;
    let largest = lane_max(value, plane);
    // The first is the one whose number, taken from that of all, is the largest.
    let behind = f32::cast_from((comptime!(units).runtime() - unit) as u32);
    let own = lane_max(select(value == largest, behind, 0.0f32), plane);
    // The scratch may still be read from an earlier sum.
    sync_cube();
    if unit % plane == 0 {
        scratch[unit / plane * 2] = largest;
        scratch[unit / plane * 2 + 1] = own;
    }
    sync_cube();
    let mut top = scratch[0];
    let mut place = scratch[1];
    for i in 1..comptime!(units / plane) {
        let larger = scratch[2 * i] > top;
        top = select(larger, scratch[2 * i], top);
        place = select(larger, scratch[2 * i + 1], place);
    }
    (top, comptime!(units) - usize::cast_from(place as u32))
}
