//! Pictures of measurements, as SVG.

use plotters::prelude::*;

use crate::error::Result;

/// A line of a plot.
#[derive(Clone, Debug)]
pub struct Series {
    /// Its name in the legend.
    pub name: String,
    /// Its points: bytes and bits per byte, from left to right.
    pub points: Vec<(f64, f64)>,
}

/// Colours that stay apart for most people who do not see all of them (Okabe and Ito 2008).
const COLOURS: [RGBColor; 4] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
];

/// A plot of bits per byte against a number of bytes, whose axis is logarithmic, as the text of an SVG
/// file.
///
/// # Errors
///
/// Where it cannot be drawn.
pub fn svg(title: &str, x_name: &str, series: &[Series]) -> Result<String> {
    let drawn = draw(title, x_name, series);
    drawn.map_err(|error| anyhow::anyhow!("plot: {error}").into())
}

type Drawn<T> = std::result::Result<T, Box<dyn std::error::Error>>;

fn draw(title: &str, x_name: &str, series: &[Series]) -> Drawn<String> {
    let mut text = String::new();
    {
        let area = SVGBackend::with_string(&mut text, (800, 480)).into_drawing_area();
        area.fill(&WHITE)?;
        let (xs, ys) = (range(series, |it| it.0), range(series, |it| it.1));
        let margin = ((ys.1 - ys.0) * 0.1).max(0.02);
        let mut chart = ChartBuilder::on(&area)
            .caption(title, ("sans-serif", 20))
            .margin(16)
            .x_label_area_size(44)
            .y_label_area_size(60)
            .build_cartesian_2d(
                (xs.0..xs.1.max(xs.0 * 2.0)).log_scale().base(2.0),
                ys.0 - margin..ys.1 + margin,
            )?;
        chart
            .configure_mesh()
            .x_desc(x_name)
            .y_desc("bits per byte")
            .x_label_formatter(&|x| bytes(*x))
            .y_label_formatter(&|y| format!("{y:.2}"))
            .light_line_style(TRANSPARENT)
            .draw()?;
        for (series, colour) in series.iter().zip(COLOURS.iter().cycle()) {
            let colour = *colour;
            let line = LineSeries::new(series.points.iter().copied(), colour.stroke_width(2));
            chart
                .draw_series(line.point_size(3))?
                .label(&series.name)
                .legend(move |(x, y)| {
                    PathElement::new(vec![(x, y), (x + 20, y)], colour.stroke_width(2))
                });
        }
        if series.len() > 1 {
            chart
                .configure_series_labels()
                .background_style(WHITE.mix(0.8))
                .border_style(BLACK.mix(0.3))
                .draw()?;
        }
        area.present()?;
    }
    Ok(text)
}

/// Smallest and largest of the points' values.
fn range(series: &[Series], value: impl Fn(&(f64, f64)) -> f64) -> (f64, f64) {
    let values = series.iter().flat_map(|it| &it.points).map(value);
    let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), x| {
        (low.min(x), high.max(x))
    });
    match low.is_finite() && high.is_finite() {
        true => (low, high),
        // Nothing to draw: any axis will do.
        false => (1.0, 2.0),
    }
}

/// `8192` as `8 KiB`.
fn bytes(x: f64) -> String {
    match x {
        x if x >= 1048576.0 => format!("{} MiB", x / 1048576.0),
        x if x >= 1024.0 => format!("{} KiB", x / 1024.0),
        x => format!("{x} B"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plot_has_its_lines_names_and_axes() {
        let line = |name: &str, shift: f64| Series {
            name: name.to_owned(),
            points: (0..5)
                .map(|i| (256.0 * f64::from(1 << i), 2.0 + shift / f64::from(i + 1)))
                .collect(),
        };
        let svg = svg(
            "a <title>",
            "position",
            &[line("one", 0.1), line("two", 0.3)],
        )
        .expect("drawn");
        for part in [
            "<svg",
            "a &lt;title&gt;",
            "position",
            "bits per byte",
            "one",
            "two",
            "KiB",
        ] {
            assert!(svg.contains(part), "{part} in {svg}");
        }
        assert!(svg.matches("<circle").count() >= 10, "{svg}");
        assert!(svg.matches("<polyline").count() >= 2);
    }

    #[test]
    fn a_single_point_and_none_are_drawn() {
        let one = Series {
            name: "x".to_owned(),
            points: vec![(8192.0, 1.5)],
        };
        assert!(svg("t", "x", &[one]).is_ok());
        assert!(svg("t", "x", &[]).is_ok());
    }

    #[test]
    fn axes_count_in_powers_of_two() {
        assert_eq!(bytes(256.0), "256 B");
        assert_eq!(bytes(8192.0), "8 KiB");
        assert_eq!(bytes(524_288.0), "512 KiB");
        assert_eq!(bytes(2_097_152.0), "2 MiB");
    }
}
