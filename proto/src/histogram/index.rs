//! Finds the bucket of a value with integers alone.
//!
//! A position is the number of boundaries below a value: 0 is the underflow, 1 to 431 are the buckets
//! and 432 is the overflow. It is looked up by the value's leading zeros and the five bits after its
//! highest one. Such a cell is at most 1/32 of its start wide, and boundaries are 4.4 % apart, so a cell
//! has at most one boundary in it: the table says which, and one compare on which side the value is.

use super::{BUCKETS, MIN_OTEL_INDEX, table::UPPER_NS};

/// Position of the values below all buckets.
pub(super) const UNDERFLOW: usize = 0;

/// Position of the values above all buckets.
pub(super) const OVERFLOW: usize = BUCKETS + 1;

/// Bits of a value after its highest one that choose a cell.
const MANTISSA_BITS: u32 = 5;

/// Cells in a doubling.
const CELLS_PER_DOUBLING: usize = 1 << MANTISSA_BITS;

/// The largest value in the underflow.
const UNDERFLOW_NS: u64 = UPPER_NS[0];

/// The smallest value in the overflow.
const OVERFLOW_NS: u64 = UPPER_NS[BUCKETS] + 1;

const FIRST_CELL: usize = cell(UNDERFLOW_NS);
const CELLS: usize = cell(OVERFLOW_NS) - FIRST_CELL + 1;

/// The position of each cell's smallest value.
static POSITIONS: [u16; CELLS] = positions();

/// The position of a value: how many boundaries are below it.
#[inline]
pub(super) fn position(ns: u64) -> usize {
    let ns = ns.clamp(UNDERFLOW_NS, OVERFLOW_NS);
    let position = usize::from(POSITIONS[cell(ns) - FIRST_CELL]);
    position + usize::from(UPPER_NS[position] < ns)
}

/// The OpenTelemetry index of the bucket at a position.
pub(super) fn otel_index(position: usize) -> i32 {
    // A position is at most 432, so that nothing is cut off.
    MIN_OTEL_INDEX - 1 + position as i32
}

/// The number of a value's cell; consecutive cells have consecutive numbers. The value is at least 32.
const fn cell(ns: u64) -> usize {
    let shift = u64::BITS - 1 - MANTISSA_BITS - ns.leading_zeros();
    // The shifted value keeps its highest bit, which counts as the step to the next doubling.
    shift as usize * CELLS_PER_DOUBLING + (ns >> shift) as usize
}

/// The smallest value of a cell.
const fn cell_start(cell: usize) -> u64 {
    let shift = cell / CELLS_PER_DOUBLING - 1;
    ((cell % CELLS_PER_DOUBLING + CELLS_PER_DOUBLING) as u64) << shift
}

const fn positions() -> [u16; CELLS] {
    let mut positions = [0; CELLS];
    let mut position = 0;
    let mut i = 0;
    while i < CELLS {
        let start = cell_start(FIRST_CELL + i);
        let next_start = cell_start(FIRST_CELL + i + 1);
        assert!(cell(start) == FIRST_CELL + i && cell(next_start - 1) == FIRST_CELL + i);
        let mut boundaries = 0;
        while position < BUCKETS && UPPER_NS[position] < start {
            position += 1;
            boundaries += 1;
        }
        assert!(boundaries <= 1, "two boundaries in one cell");
        positions[i] = position as u16;
        i += 1;
    }
    positions
}
