//! A histogram as SVG.

use std::fmt::Write;
use std::time::Duration;

const WIDTH: f64 = 800.0;
const HEIGHT: f64 = 420.0;
/// The frame of the bars: left, top, right, bottom.
const FRAME: (f64, f64, f64, f64) = (70.0, 60.0, 770.0, 360.0);
const BARS: usize = 50;
/// More than the longest label above the bars takes.
const LABEL: f64 = 150.0;

/// Draws how many of the times, which are in their order, fall into each of 50 spans.
pub(crate) fn histogram(title: &str, times: &[Duration]) -> String {
    let ms: Vec<f64> = times.iter().map(|time| time.as_secs_f64() * 1e3).collect();
    let longest = nice(ms.last().copied().unwrap_or(1.0));
    let mut counts = [0_u32; BARS];
    for time in &ms {
        let bar = (time / longest * BARS as f64) as usize;
        counts[bar.min(BARS - 1)] += 1;
    }
    let most = nice(f64::from(counts.iter().copied().max().unwrap_or(1)));
    let (left, top, right, bottom) = FRAME;
    let x = |time: f64| left + (right - left) * time / longest;
    let y = |count: f64| bottom - (bottom - top) * count / most;

    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" \
         font-family=\"sans-serif\" font-size=\"13\">\n\
         <rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"white\"/>\n\
         <text x=\"{left}\" y=\"28\" font-size=\"17\">{title}</text>\n"
    );
    for i in 0..=5 {
        let (time, count) = (longest * f64::from(i) / 5.0, most * f64::from(i) / 5.0);
        let (tick_x, tick_y) = (x(time), y(count));
        writeln!(
            svg,
            "<path d=\"M{left} {tick_y:.1}H{right}\" stroke=\"#ddd\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{count}</text>\
             <path d=\"M{tick_x:.1} {bottom}v6\" stroke=\"black\"/>\
             <text x=\"{tick_x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{time}</text>",
            left - 8.0,
            tick_y + 4.5,
            bottom + 22.0,
        )
        .ok();
    }
    for (bar, count) in counts.iter().enumerate().filter(|(_, count)| **count > 0) {
        let (from, to) = (bar as f64, bar as f64 + 1.0);
        let (from, to) = (x(longest * from / 50.0), x(longest * to / 50.0));
        let high = y(f64::from(*count));
        writeln!(
            svg,
            "<rect x=\"{from:.1}\" y=\"{high:.1}\" width=\"{:.1}\" height=\"{:.1}\" fill=\"#4878a8\"/>",
            to - from - 1.0,
            bottom - high,
        )
        .ok();
    }
    let rank = |percent: usize| (ms.len() * percent).div_ceil(100).max(1);
    let [half, most_of] = [50, 99].map(|percent| ms.get(rank(percent) - 1).copied());
    // Side by side where there is no room for one label beside the other.
    let are_close = matches!((half, most_of), (Some(a), Some(b)) if x(b) - x(a) < LABEL);
    let anchors = if are_close {
        ["end", "start"]
    } else {
        ["middle"; 2]
    };
    for ((time, label), anchor) in [(half, "half"), (most_of, "99 of 100")]
        .into_iter()
        .zip(anchors)
    {
        let Some(time) = time else { continue };
        writeln!(
            svg,
            "<path d=\"M{0:.1} {1}V{bottom}\" stroke=\"#c03030\" stroke-dasharray=\"5 4\"/>\
             <text x=\"{3:.1}\" y=\"{2}\" text-anchor=\"{anchor}\" fill=\"#c03030\">{label}: {time:.0} ms</text>",
            x(time),
            top - 4.0,
            top - 8.0,
            match anchor {
                "end" => x(time) - 5.0,
                // The longest label still ends in the picture.
                "start" => (x(time) + 5.0).min(WIDTH - LABEL),
                _ => x(time),
            },
        )
        .ok();
    }
    writeln!(
        svg,
        "<path d=\"M{left} {top}V{bottom}H{right}\" fill=\"none\" stroke=\"black\"/>\n\
         <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">milliseconds until the lease was held</text>\n\
         <text transform=\"translate(20 {:.1}) rotate(-90)\" text-anchor=\"middle\">nodes</text>\n</svg>",
        (left + right) / 2.0,
        bottom + 45.0,
        (top + bottom) / 2.0,
    )
    .ok();
    svg
}

/// The next number from this one on that five steps divide into round parts.
fn nice(most: f64) -> f64 {
    let power = 10_f64.powf(most.max(1.0).log10().floor());
    let steps = [1.0, 2.0, 2.5, 5.0, 10.0].map(|step| step * power);
    let enough = steps.into_iter().find(|step| *step >= most);
    enough.unwrap_or(most).max(5.0)
}
