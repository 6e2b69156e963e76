//! Quantities as people read them.

/// `538.1 MB`: decimal units, as disks and file managers count.
pub fn bytes(n: u64) -> String {
    const UNITS: [&str; 5] = ["B", "kB", "MB", "GB", "TB"];
    let mut value = n as f64;
    let mut unit = 0;
    while value >= 999.95 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    match unit {
        0 => format!("{n} B"),
        _ => format!("{value:.1} {}", UNITS[unit]),
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn sizes_read_well() {
        let read = [0, 999, 1000, 999_949, 999_950, 538_060_032, 4_100_000_000].map(super::bytes);
        assert_eq!(
            read,
            ["0 B", "999 B", "1.0 kB", "999.9 kB", "1.0 MB", "538.1 MB", "4.1 GB"]
        );
    }
}
