//! `strftime_now`: Python's `datetime.now().strftime(format)` in the C locale, which has no time zone.

use chrono::{Datelike, NaiveDateTime, Timelike};

use super::Error;

const DAYS: [&str; 7] = [
    "Sunday",
    "Monday",
    "Tuesday",
    "Wednesday",
    "Thursday",
    "Friday",
    "Saturday",
];
const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];

/// The C library of the system decides what other directives, flags and widths mean; they are refused.
pub(super) fn strftime(format: &str, time: &NaiveDateTime) -> Result<String, Error> {
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let Some(mut directive) = chars.next() else {
            // A percent sign at the end is literal.
            out.push('%');
            break;
        };
        let mut flag = None;
        if matches!(directive, '-' | '_' | '0' | '^') {
            flag = Some(directive);
            directive = chars.next().unwrap_or('\0');
        }
        let weekday = time.weekday().num_days_from_sunday() as usize;
        let month = MONTHS[time.month0() as usize];
        let hour12 = if time.hour().is_multiple_of(12) {
            12
        } else {
            time.hour() % 12
        };
        let half = if time.hour() < 12 { "AM" } else { "PM" };
        let day_of_year = time.ordinal();
        let number = |value: u32, width: usize, pad: char| match (flag, pad) {
            (Some('-'), _) => value.to_string(),
            (Some('_'), _) | (None, ' ') => format!("{value:>width$}"),
            _ => format!("{value:0width$}"),
        };
        let year = u32::try_from(time.year()).unwrap_or_default();
        let iso_year = u32::try_from(time.iso_week().year()).unwrap_or_default();
        let (text, is_number) = match directive {
            'a' => (DAYS[weekday][..3].to_string(), false),
            'A' => (DAYS[weekday].to_string(), false),
            'b' | 'h' => (month[..3].to_string(), false),
            'B' => (month.to_string(), false),
            'p' => (half.to_string(), false),
            'd' => (number(time.day(), 2, '0'), true),
            'e' => (number(time.day(), 2, ' '), true),
            'm' => (number(time.month(), 2, '0'), true),
            'y' => (number(year % 100, 2, '0'), true),
            'C' => (number(year / 100, 2, '0'), true),
            'Y' => (number(year, 4, '0'), true),
            'G' => (number(iso_year, 4, '0'), true),
            'g' => (number(iso_year % 100, 2, '0'), true),
            'V' => (number(time.iso_week().week(), 2, '0'), true),
            'U' => (number((day_of_year + 6 - weekday as u32) / 7, 2, '0'), true),
            'W' => (number((day_of_year + 6 - (weekday as u32 + 6) % 7) / 7, 2, '0'), true),
            'u' => (number(time.weekday().number_from_monday(), 1, '0'), true),
            'w' => (number(weekday as u32, 1, '0'), true),
            'H' => (number(time.hour(), 2, '0'), true),
            'k' => (number(time.hour(), 2, ' '), true),
            'I' => (number(hour12, 2, '0'), true),
            'l' => (number(hour12, 2, ' '), true),
            'M' => (number(time.minute(), 2, '0'), true),
            'S' => (number(time.second(), 2, '0'), true),
            'j' => (number(day_of_year, 3, '0'), true),
            'f' if flag.is_none() => (format!("{:06}", time.nanosecond() / 1000 % 1_000_000), true),
            'z' | 'Z' if flag.is_none() => (String::new(), true),
            'P' if flag.is_none() => (half.to_lowercase(), false),
            '%' if flag.is_none() => ("%".to_string(), false),
            'n' if flag.is_none() => ("\n".to_string(), false),
            't' if flag.is_none() => ("\t".to_string(), false),
            'c' if flag.is_none() => (strftime("%a %b %e %H:%M:%S %Y", time)?, false),
            'D' | 'x' if flag.is_none() => (strftime("%m/%d/%y", time)?, false),
            'F' if flag.is_none() => (strftime("%Y-%m-%d", time)?, false),
            'T' | 'X' if flag.is_none() => (strftime("%H:%M:%S", time)?, false),
            'R' if flag.is_none() => (strftime("%H:%M", time)?, false),
            'r' if flag.is_none() => (strftime("%I:%M:%S %p", time)?, false),
            _ => {
                let flag = flag.map(String::from).unwrap_or_default();
                return Err(Error::unsupported(format!(
                    "%{flag}{directive} in a format of strftime_now"
                )));
            }
        };
        match (flag, is_number) {
            (Some('^'), false) => out.push_str(&text.to_uppercase()),
            (None, false) | (_, true) => out.push_str(&text),
            (Some(flag), false) => {
                return Err(Error::unsupported(format!(
                    "%{flag}{directive} in a format of strftime_now"
                )));
            }
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Written by scripts/jinja_cases.py.
    #[test]
    fn formats_are_pythons() {
        let document: serde_json::Value =
            serde_json::from_str(include_str!("../../../fixtures/jinja/cases.json")).unwrap();
        let now: NaiveDateTime = document["now"].as_str().unwrap().parse().unwrap();
        let mut refused = Vec::new();
        for case in document["strftime"].as_array().unwrap() {
            let format = case[0].as_str().unwrap();
            match strftime(format, &now) {
                Ok(text) => assert_eq!(Some(text.as_str()), case[1].as_str(), "{format:?}"),
                Err(_) => refused.push(format),
            }
        }
        let common = [
            "%Y", "%m", "%d", "%B", "%A", "%H", "%M", "%f", "%Z", "%-d", "100%", "%j",
        ];
        assert!(common.iter().all(|format| !refused.contains(format)), "{refused:?}");
        assert!(refused.len() < 30, "{refused:?}");
    }
}
