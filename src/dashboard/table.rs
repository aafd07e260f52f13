//! Rows of one kind of record, ordered by step, thinned out for a screen.

use serde::Serialize;

use super::column::{Column, Summary};

/// Most columns of a table. A line with more keys than that is not a run of ours.
const MOST_COLUMNS: usize = 128;

/// What the horizontal axis is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AxisKind {
    /// Optimizer steps.
    Step,
    /// Bytes learnt from.
    Bytes,
    /// Seconds since 1970, or since the run's start where lines have no time.
    Time,
}

/// A place on all three axes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Place {
    pub(super) step: f64,
    pub(super) bytes: f64,
    pub(super) time: f64,
}

/// A stretch of an axis and how finely it is looked at.
#[derive(Clone, Copy, Debug)]
pub(super) struct View {
    pub(super) axis: AxisKind,
    pub(super) from: f64,
    pub(super) to: f64,
    /// Points wanted, about.
    pub(super) points: usize,
    /// Points at equal ratios of their distance from here, instead of equal distances.
    pub(super) log_from: Option<f64>,
}

/// What is drawn of one column: for each point the extremes and the mean of the rows behind it.
/// Extremes are left out where a point is one value.
#[derive(Clone, Debug, Default, Serialize)]
pub(super) struct Drawn {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) min: Vec<f32>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) max: Vec<f32>,
    pub(super) mean: Vec<f32>,
    /// Values behind each point; left out where every record behind it has one.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) count: Vec<u32>,
}

/// The columns of one kind of record.
#[derive(Clone, Debug)]
pub(super) struct Table {
    places: Vec<Place>,
    names: Vec<String>,
    columns: Vec<Column>,
    /// Records behind a row.
    stride: usize,
    /// Records in the last row.
    filled: usize,
}

impl Default for Table {
    fn default() -> Self {
        Self {
            places: Vec::new(),
            names: Vec::new(),
            columns: Vec::new(),
            stride: 1,
            filled: 0,
        }
    }
}

impl Table {
    pub(super) fn names(&self) -> &[String] {
        &self.names
    }

    pub(super) fn rows(&self) -> usize {
        self.places.len()
    }

    pub(super) fn stride(&self) -> usize {
        self.stride
    }

    pub(super) fn first(&self) -> Option<Place> {
        self.places.first().copied()
    }

    pub(super) fn last(&self) -> Option<Place> {
        self.places.last().copied()
    }

    pub(super) fn place(&self, row: usize) -> Place {
        self.places[row]
    }

    pub(super) fn column(&self, name: &str) -> Option<&Column> {
        let index = self.names.iter().position(|it| it == name)?;
        self.columns.get(index)
    }

    /// The newest value of a column that is a number, among the last `rows` rows.
    pub(super) fn newest(&self, name: &str, rows: usize) -> Option<f32> {
        let column = self.column(name)?;
        (self.rows().saturating_sub(rows)..self.rows())
            .rev()
            .map(|i| column.at(i))
            .find(|it| it.count > 0)
            .map(|it| it.mean)
    }

    /// Column number `name`; none where there are too many.
    pub(super) fn column_index(&mut self, name: &str, guess: usize) -> Option<usize> {
        if self.names.get(guess).is_some_and(|it| it == name) {
            return Some(guess);
        }
        if let Some(index) = self.names.iter().position(|it| it == name) {
            return Some(index);
        }
        if self.names.len() == MOST_COLUMNS {
            return None;
        }
        self.names.push(name.to_owned());
        self.columns
            .push(Column::after(self.places.len(), self.stride > 1));
        Some(self.names.len() - 1)
    }

    /// Adds a record. Axes never go back: a clock that was set back stands still.
    pub(super) fn push(&mut self, place: Place, values: &[(usize, f32)]) {
        let last = self.last().unwrap_or_default();
        let place = Place {
            step: place.step,
            bytes: place.bytes.max(last.bytes),
            time: place.time.max(last.time),
        };
        let new_row = self.filled == 0 || self.filled == self.stride;
        match self.places.last_mut() {
            Some(last) if !new_row => {
                *last = place;
                self.filled += 1;
                for (column, value) in values {
                    self.columns[*column].merge(*value);
                }
            }
            _ => {
                self.places.push(place);
                self.filled = 1;
                for (column, value) in values {
                    // A key that comes twice in a line counts once.
                    if self.columns[*column].len() < self.places.len() {
                        self.columns[*column].push(*value);
                    }
                }
                for column in &mut self.columns {
                    if column.len() < self.places.len() {
                        column.push(f32::NAN);
                    }
                }
            }
        }
    }

    /// Forgets the records after `step`. Rows that stand for several, of which some are later, go
    /// as a whole.
    pub(super) fn truncate_after(&mut self, step: f64) {
        let rows = self.places.partition_point(|it| it.step <= step);
        if rows == self.places.len() {
            return;
        }
        self.places.truncate(rows);
        for column in &mut self.columns {
            column.truncate(rows);
        }
        self.filled = self.stride.min(rows * self.stride);
    }

    /// Puts rows together until there are at most `limit`; of folded ones, which take four times
    /// the memory, half as many.
    pub(super) fn limit(&mut self, limit: usize) {
        loop {
            let (most, factor) = match self.stride {
                1 => (limit, 4),
                _ => (limit / 2, 2),
            };
            if self.places.len() <= most.max(4) {
                return;
            }
            let rows = self.places.len();
            let ends = (0..rows)
                .step_by(factor)
                .map(|i| self.places[rows.min(i + factor) - 1]);
            self.places = ends.collect();
            for column in &mut self.columns {
                column.fold(factor);
            }
            let in_last = rows - (self.places.len() - 1) * factor;
            self.filled += (in_last - 1) * self.stride;
            self.stride *= factor;
        }
    }

    /// What is to be drawn of `columns` in `view`: places with the number of records behind each, and
    /// for each column its points. A row before and one behind the view are included, so that lines
    /// go on to its edges.
    pub(super) fn draw(&self, view: &View, columns: &[&Column]) -> (Vec<(Place, u32)>, Vec<Drawn>) {
        let x = |place: &Place| match view.axis {
            AxisKind::Step => place.step,
            AxisKind::Bytes => place.bytes,
            AxisKind::Time => place.time,
        };
        let start = self.places.partition_point(|it| x(it) < view.from);
        let end = self.places.partition_point(|it| x(it) <= view.to);
        let rows = start.saturating_sub(1)..(end + 1).min(self.places.len());
        let mut edges = vec![rows.start];
        if rows.len() <= 2 * view.points {
            edges.extend(rows.start + 1..=rows.end);
        } else {
            edges.push(start.max(rows.start));
            for i in 1..=view.points {
                let edge = view.edge(i);
                let from = *edges.last().unwrap_or(&start);
                let ahead = &self.places[from..end];
                edges.push(from + ahead.partition_point(|it| x(it) <= edge));
            }
            edges.push(end);
            edges.push(rows.end);
        }
        edges.dedup();
        let stretches = edges.windows(2).map(|it| (it[0], it[1]));
        let records = |(from, to): (usize, usize)| {
            let partial = match to == self.places.len() {
                true => self.stride - self.filled,
                false => 0,
            };
            ((to - from) * self.stride - partial) as u32
        };
        let counts: Vec<u32> = stretches.clone().map(records).collect();
        let places = stretches.clone().zip(&counts);
        let places = places.map(|((_, to), count)| (self.places[to - 1], *count));
        let drawn = columns.iter().map(|column| {
            let points: Vec<Summary> = stretches
                .clone()
                .map(|(from, to)| column.summary(from, to))
                .collect();
            let single = points.iter().all(|it| it.count <= 1);
            let dense = points.iter().zip(&counts).all(|(it, all)| it.count == *all);
            let unless = |left_out: bool, value: fn(&Summary) -> f32| match left_out {
                true => Vec::new(),
                false => points.iter().map(value).collect(),
            };
            Drawn {
                min: unless(single, |it| it.min),
                max: unless(single, |it| it.max),
                mean: unless(false, |it| it.mean),
                count: match dense {
                    true => Vec::new(),
                    false => points.iter().map(|it| it.count).collect(),
                },
            }
        });
        (places.collect(), drawn.collect())
    }

    /// Bytes of memory.
    pub(super) fn bytes(&self) -> usize {
        self.places.capacity() * size_of::<Place>()
            + self.columns.iter().map(Column::bytes).sum::<usize>()
    }
}

impl View {
    /// Where point `i` of 1 to `points` ends.
    fn edge(&self, i: usize) -> f64 {
        if i == self.points {
            return self.to;
        }
        let share = i as f64 / self.points as f64;
        match self.log_from {
            None => self.from + (self.to - self.from) * share,
            Some(origin) => {
                let low = (self.from - origin).max(1e-9);
                let high = (self.to - origin).max(low);
                origin + low * (high / low).powf(share)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(rows: usize) -> Table {
        let mut table = Table::default();
        let column = table.column_index("loss", 0).expect("room");
        for i in 0..rows {
            let place = at(i + 1);
            table.push(place, &[(column, (i as f32 * 0.1).sin())]);
        }
        table
    }

    fn at(step: usize) -> Place {
        Place {
            step: step as f64,
            bytes: 10.0 * step as f64,
            time: 1e9 + step as f64,
        }
    }

    fn view(from: f64, to: f64, points: usize) -> View {
        View {
            axis: AxisKind::Step,
            from,
            to,
            points,
            log_from: None,
        }
    }

    #[test]
    fn few_rows_are_drawn_one_by_one_with_their_neighbours() {
        let table = table(100);
        let column = table.column("loss").expect("there");
        let (places, drawn) = table.draw(&view(10.0, 20.0, 50), &[column]);
        let steps: Vec<f64> = places.iter().map(|it| it.0.step).collect();
        assert_eq!(steps, (9..=21).map(f64::from).collect::<Vec<_>>());
        assert!(drawn[0].min.is_empty() && drawn[0].mean.len() == 13);
    }

    #[test]
    fn many_rows_keep_their_extremes_and_their_number() {
        let mut table = table(100_000);
        let column = table.column_index("loss", 0).expect("there");
        table.push(at(100_001), &[(column, 50.0)]);
        for log_from in [None, Some(0.0)] {
            let view = View {
                log_from,
                ..view(1.0, 100_001.0, 300)
            };
            let column = table.column("loss").expect("there");
            let (places, drawn) = table.draw(&view, &[column]);
            assert!((100..=304).contains(&places.len()), "{}", places.len());
            assert!(places.is_sorted_by(|a, b| a.0.step < b.0.step));
            let top = drawn[0].max.iter().copied().reduce(f32::max);
            assert_eq!(top, Some(50.0));
            assert_eq!(places.iter().map(|it| it.1).sum::<u32>(), 100_001);
            assert!(drawn[0].count.is_empty(), "every record has a value");
        }
    }

    #[test]
    fn going_back_forgets_what_came_later() {
        let mut table = table(1000);
        table.truncate_after(400.0);
        assert_eq!(table.rows(), 400);
        table.push(at(401), &[(0, 7.0)]);
        assert_eq!(table.newest("loss", 1), Some(7.0));
        assert_eq!(table.last().map(|it| it.step), Some(401.0));
    }

    #[test]
    fn memory_stays_bounded_and_no_record_is_counted_twice() {
        let mut table = Table::default();
        let column = table.column_index("loss", 0).expect("room");
        for i in 0..200_000 {
            table.push(at(i + 1), &[(column, i as f32)]);
            table.limit(4096);
            assert!(table.rows() <= 4096);
        }
        assert!(table.bytes() < 1 << 20, "{}", table.bytes());
        let column = table.column("loss").expect("there");
        let sum = column.summary(0, table.rows());
        assert_eq!((sum.min, sum.max, sum.count), (0.0, 199_999.0, 200_000));
        table.truncate_after(100_000.0);
        table.push(at(100_001), &[(0, 1.0)]);
        assert_eq!(table.last().map(|it| it.step), Some(100_001.0));
    }

    #[test]
    fn a_column_may_come_late_and_be_missing() {
        let mut table = table(10);
        let late = table.column_index("late", 1).expect("room");
        table.push(at(11), &[(late, 3.0)]);
        table.push(at(12), &[(0, 1.0)]);
        assert_eq!(table.newest("late", 5), Some(3.0));
        assert_eq!(table.newest("late", 1), None);
        for i in 0..2 * MOST_COLUMNS {
            table.column_index(&format!("c{i}"), 0);
        }
        assert_eq!(table.names().len(), MOST_COLUMNS);
    }
}
