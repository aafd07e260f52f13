//! The values of one metric, with what is needed to draw any stretch of them quickly.

/// Rows that share a summary. A stretch of any length costs at most two of these in single rows.
const CHUNK: usize = 64;

/// Smallest, largest and mean value of a stretch of rows, without those that have none.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Summary {
    pub(super) min: f32,
    pub(super) max: f32,
    pub(super) mean: f32,
    /// Values that went in.
    pub(super) count: u32,
}

impl Summary {
    pub(super) const EMPTY: Self = Self {
        min: f32::NAN,
        max: f32::NAN,
        mean: f32::NAN,
        count: 0,
    };

    /// One value; none where it is not a finite number.
    pub(super) fn of(value: f32) -> Self {
        match value.is_finite() {
            true => Self {
                min: value,
                max: value,
                mean: value,
                count: 1,
            },
            false => Self::EMPTY,
        }
    }

    /// Both together.
    pub(super) fn and(self, other: Self) -> Self {
        if other.count == 0 {
            return self;
        }
        if self.count == 0 {
            return other;
        }
        let count = self.count.saturating_add(other.count);
        let share = f64::from(other.count) / f64::from(count);
        let mean = f64::from(self.mean) * (1.0 - share) + f64::from(other.mean) * share;
        Self {
            min: self.min.min(other.min),
            max: self.max.max(other.max),
            mean: mean as f32,
            count,
        }
    }
}

/// Values row by row, or, in a long run, of several rows together.
#[derive(Clone, Debug)]
enum Values {
    Single(Vec<f32>),
    Folded(Vec<Summary>),
}

/// One column of a table.
#[derive(Clone, Debug)]
pub(super) struct Column {
    values: Values,
    /// Of every full chunk.
    chunks: Vec<Summary>,
}

impl Column {
    /// A column that appears after `rows` rows without it.
    pub(super) fn after(rows: usize, folded: bool) -> Self {
        let mut column = Self {
            values: match folded {
                true => Values::Folded(vec![Summary::EMPTY; rows]),
                false => Values::Single(vec![f32::NAN; rows]),
            },
            chunks: Vec::new(),
        };
        column.complete_chunks();
        column
    }

    pub(super) fn len(&self) -> usize {
        match &self.values {
            Values::Single(values) => values.len(),
            Values::Folded(values) => values.len(),
        }
    }

    /// Row `i` as a summary.
    pub(super) fn at(&self, i: usize) -> Summary {
        match &self.values {
            Values::Single(values) => Summary::of(values[i]),
            Values::Folded(values) => values[i],
        }
    }

    /// Adds a row.
    pub(super) fn push(&mut self, value: f32) {
        match &mut self.values {
            Values::Single(values) => values.push(value),
            Values::Folded(values) => values.push(Summary::of(value)),
        }
        self.complete_chunks();
    }

    /// Adds a value to the last row, which in a folded column stands for several.
    pub(super) fn merge(&mut self, value: f32) {
        let Values::Folded(values) = &mut self.values else {
            return;
        };
        if let Some(last) = values.last_mut() {
            *last = last.and(Summary::of(value));
        }
        // The last row's chunk, if it is full, has to be summed again.
        let full = values.len() / CHUNK;
        self.chunks.truncate(match values.len() % CHUNK {
            0 => full.saturating_sub(1),
            _ => full,
        });
        self.complete_chunks();
    }

    /// Keeps the first `rows`.
    pub(super) fn truncate(&mut self, rows: usize) {
        match &mut self.values {
            Values::Single(values) => values.truncate(rows),
            Values::Folded(values) => values.truncate(rows),
        }
        self.chunks.truncate(rows / CHUNK);
    }

    /// Puts `factor` rows each into one.
    pub(super) fn fold(&mut self, factor: usize) {
        let rows = self.len();
        let folded = (0..rows).step_by(factor).map(|i| {
            (i..rows.min(i + factor))
                .map(|i| self.at(i))
                .fold(Summary::EMPTY, Summary::and)
        });
        self.values = Values::Folded(folded.collect());
        self.chunks.clear();
        self.complete_chunks();
    }

    /// Rows `from..to` together.
    pub(super) fn summary(&self, from: usize, to: usize) -> Summary {
        let mut sum = Summary::EMPTY;
        let mut i = from;
        while i < to {
            if i.is_multiple_of(CHUNK) && i + CHUNK <= to {
                sum = sum.and(self.chunks[i / CHUNK]);
                i += CHUNK;
            } else {
                sum = sum.and(self.at(i));
                i += 1;
            }
        }
        sum
    }

    /// Bytes of memory.
    pub(super) fn bytes(&self) -> usize {
        let values = match &self.values {
            Values::Single(values) => values.capacity() * size_of::<f32>(),
            Values::Folded(values) => values.capacity() * size_of::<Summary>(),
        };
        values + self.chunks.capacity() * size_of::<Summary>()
    }

    fn complete_chunks(&mut self) {
        let full = self.len() / CHUNK;
        for chunk in self.chunks.len()..full {
            let rows = chunk * CHUNK..(chunk + 1) * CHUNK;
            let sum = rows.map(|i| self.at(i)).fold(Summary::EMPTY, Summary::and);
            self.chunks.push(sum);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The obvious form.
    fn plain(values: &[f32]) -> Option<(f32, f32, f64)> {
        let good: Vec<f32> = values.iter().copied().filter(|it| it.is_finite()).collect();
        let min = good.iter().copied().reduce(f32::min)?;
        let max = good.iter().copied().reduce(f32::max)?;
        let mean = good.iter().map(|it| f64::from(*it)).sum::<f64>() / good.len() as f64;
        Some((min, max, mean))
    }

    fn wavy(rows: usize) -> Vec<f32> {
        (0..rows)
            .map(|i| match i % 97 {
                13 => f32::NAN,
                _ => (i as f32 * 0.37).sin() * (1.0 + i as f32 * 0.01),
            })
            .collect()
    }

    fn assert_agrees(column: &Column, values: &[f32], from: usize, to: usize, stride: usize) {
        let got = column.summary(from, to);
        let last = values.len().min(to * stride);
        match plain(&values[from * stride..last]) {
            None => assert_eq!(got.count, 0),
            Some((min, max, mean)) => {
                assert_eq!((got.min, got.max), (min, max), "{from}..{to}");
                assert!((f64::from(got.mean) - mean).abs() < 1e-4, "{from}..{to}");
            }
        }
    }

    #[test]
    fn any_stretch_is_what_its_rows_are() {
        let values = wavy(1000);
        let mut column = Column::after(0, false);
        for value in &values {
            column.push(*value);
        }
        for (from, to) in [
            (0, 0),
            (0, 1000),
            (1, 63),
            (64, 128),
            (63, 129),
            (999, 1000),
        ] {
            assert_agrees(&column, &values, from, to, 1);
        }
        column.truncate(131);
        assert_agrees(&column, &values[..131], 3, 131, 1);
        for value in &values[131..] {
            column.push(*value);
        }
        assert_agrees(&column, &values, 100, 900, 1);
    }

    #[test]
    fn a_folded_column_has_the_same_extremes_and_grows_on() {
        let values = wavy(1003);
        let mut column = Column::after(0, false);
        for value in &values[..800] {
            column.push(*value);
        }
        column.fold(4);
        assert_eq!(column.len(), 200);
        for (i, value) in values.iter().enumerate().skip(800) {
            match i % 4 {
                0 => column.push(*value),
                _ => column.merge(*value),
            }
        }
        assert_eq!(column.len(), 251);
        for (from, to) in [(0, 251), (10, 11), (190, 251), (63, 193)] {
            assert_agrees(&column, &values, from, to, 4);
        }
    }

    #[test]
    fn a_column_that_comes_late_has_nothing_before() {
        let mut column = Column::after(130, false);
        column.push(2.0);
        assert_eq!(column.summary(0, 130).count, 0);
        assert_eq!(column.summary(0, 131).max, 2.0);
    }
}
