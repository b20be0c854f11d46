//! The table as bars.

use std::fmt::Write;

use crate::Row;

const WIDTH: f64 = 760.0;
/// The space of one bar, of the title, and left of the bars.
const BAR: f64 = 26.0;
const TOP: f64 = 56.0;
const LEFT: f64 = 120.0;
const RIGHT: f64 = 600.0;
const COLOURS: [&str; 3] = ["#8a8a8a", "#4878a8", "#c08030"];

/// Draws each way as a multiple of the first one, with the measured value beside it.
pub(crate) fn bars(ways: &[&str], rows: &[Row]) -> String {
    let group = BAR * ways.len() as f64 + 44.0;
    let height = TOP + group * rows.len() as f64;
    let most = rows
        .iter()
        .flat_map(|row| (0..ways.len()).map(|way| row.ratios[way]));
    let most = most.fold(1.0, f64::max);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height:.0}\" \
         font-family=\"sans-serif\" font-size=\"13\">\n\
         <rect width=\"{WIDTH}\" height=\"{height:.0}\" fill=\"white\"/>\n\
         <text x=\"16\" y=\"28\" font-size=\"17\">Between two pods, as a multiple of bare routing</text>\n"
    );
    for (i, row) in rows.iter().enumerate() {
        let top = TOP + group * i as f64;
        writeln!(
            svg,
            "<text x=\"16\" y=\"{:.0}\" font-weight=\"bold\">{}</text>",
            top + 12.0,
            row.kind.name(),
        )
        .ok();
        for (way, name) in ways.iter().enumerate() {
            let y = top + 22.0 + BAR * way as f64;
            let width = (RIGHT - LEFT) * row.ratios[way] / most;
            writeln!(
                svg,
                "<text x=\"{:.0}\" y=\"{:.1}\" text-anchor=\"end\">{name}</text>\
                 <rect x=\"{LEFT}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{:.1}\" fill=\"{}\"/>\
                 <text x=\"{:.1}\" y=\"{:.1}\">{:.2} ({})</text>",
                LEFT - 8.0,
                y + 15.0,
                BAR - 6.0,
                COLOURS[way % COLOURS.len()],
                LEFT + width + 8.0,
                y + 15.0,
                row.ratios[way],
                row.kind.show(row.medians[way]),
            )
            .ok();
        }
    }
    svg.push_str("</svg>\n");
    svg
}
