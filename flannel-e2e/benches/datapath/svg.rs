//! The tables as bars: each way as a multiple of bare routing.

use std::fmt::Write;

use crate::report::{Kind, Table};
use crate::ways::WayKind;

const WIDTH: f64 = 860.0;
const TOP: f64 = 64.0;
const LEFT: f64 = 150.0;
const RIGHT: f64 = 660.0;
const BAR: f64 = 20.0;

const fn colour(way: WayKind) -> &'static str {
    match way {
        WayKind::Bare => "#8a8a8a",
        WayKind::Vxlan => "#c08030",
        WayKind::Udp => "#2e7d4f",
        WayKind::Baseline => "#a04848",
    }
}

/// Draws what more is better of: one stream, four streams, small packets.
pub(crate) fn draw(tables: &[Table]) -> String {
    let drawn = [Kind::Stream, Kind::Streams, Kind::Small];
    let mut body = String::new();
    let mut y = TOP;
    for table in tables {
        for kind in drawn.iter().filter(|kind| table.kinds.contains(kind)) {
            writeln!(
                body,
                "<text x=\"16\" y=\"{:.0}\" font-weight=\"bold\">{}: {}</text>",
                y + 12.0,
                table.what,
                kind.name()
            )
            .ok();
            y += 20.0;
            let values: Vec<f64> = (0..table.ways.len())
                .map(|way| table.median(way, *kind))
                .collect();
            let most = values.iter().copied().fold(0.0, f64::max);
            for (way, value) in table.ways.iter().zip(&values) {
                let width = (RIGHT - LEFT) * value / most;
                writeln!(
                    body,
                    "<text x=\"{:.0}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>\
                     <rect x=\"{LEFT}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{:.1}\" \
                     fill=\"{}\"/><text x=\"{:.1}\" y=\"{:.1}\">{value:.1} ({:.2})</text>",
                    LEFT - 8.0,
                    y + 13.0,
                    way.name(),
                    BAR - 4.0,
                    colour(*way),
                    LEFT + width + 8.0,
                    y + 13.0,
                    value / values[0],
                )
                .ok();
                y += BAR;
            }
            y += 10.0;
        }
    }
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {y:.0}\" \
         font-family=\"sans-serif\" font-size=\"13\">\n\
         <rect width=\"{WIDTH}\" height=\"{y:.0}\" fill=\"white\"/>\n\
         <text x=\"16\" y=\"28\" font-size=\"17\">Between two pods (in brackets: to bare routing)\
         </text>\n{body}</svg>\n"
    )
}
