//! `strftime_now` of chat templates: C's `strftime` in UTC, for the directives that templates use.

/// A second of UTC, taken apart.
struct Civil {
    year: i64,
    month: usize,
    day: i64,
    /// Days since 1 January.
    year_day: i64,
    /// 0 is Sunday.
    week_day: usize,
    second_of_day: i64,
}

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
const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

impl Civil {
    /// The proleptic Gregorian date of a Unix time (Hinnant, "chrono-compatible low-level date algorithms").
    fn of(unix_s: i64) -> Self {
        let (days, second_of_day) = (unix_s.div_euclid(86_400), unix_s.rem_euclid(86_400));
        // Years start in March, so that the leap day is the last.
        let shifted = days + 719_468;
        let (era, day_of_era) = (shifted.div_euclid(146_097), shifted.rem_euclid(146_097));
        let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let march_month = (5 * day_of_year + 2) / 153;
        let day = day_of_year - (153 * march_month + 2) / 5 + 1;
        let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
        let year = year_of_era + era * 400 + i64::from(month <= 2);
        let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
        let before_month = [0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334][month as usize - 1];
        let year_day = before_month + i64::from(leap && month > 2) + day - 1;
        let week_day = (days + 4).rem_euclid(7) as usize;
        Self { year, month: month as usize, day, year_day, week_day, second_of_day }
    }
}

/// `format` at `unix_s`.
///
/// # Errors
/// The first directive that is not one of those below, for the message.
pub(super) fn strftime(format: &str, unix_s: i64) -> Result<String, String> {
    // A hundred centuries either way: beyond, the arithmetic would overflow before any date made sense.
    let civil = Civil::of(unix_s.clamp(-315_360_000_000, 315_360_000_000));
    let mut out = String::with_capacity(format.len() * 2);
    let mut rest = format.chars();
    while let Some(character) = rest.next() {
        if character != '%' {
            out.push(character);
            continue;
        }
        let (padded, directive) = match rest.next() {
            Some('-') => (false, rest.next()),
            other => (true, other),
        };
        let directive = directive.ok_or_else(|| "%".to_owned())?;
        out.push_str(&expand(directive, padded, &civil).ok_or_else(|| format!("%{directive}"))?);
    }
    Ok(out)
}

fn expand(directive: char, padded: bool, civil: &Civil) -> Option<String> {
    let number = |value: i64, width: usize| if padded { format!("{value:0width$}") } else { value.to_string() };
    let (hour, minute, second) = (civil.second_of_day / 3_600, civil.second_of_day / 60 % 60, civil.second_of_day % 60);
    let hour12 = if hour % 12 == 0 { 12 } else { hour % 12 };
    let (month, day) = (MONTHS[civil.month - 1], DAYS[civil.week_day]);
    Some(match directive {
        'Y' => number(civil.year, 4),
        'y' => number(civil.year.rem_euclid(100), 2),
        'm' => number(civil.month as i64, 2),
        'd' => number(civil.day, 2),
        'e' => format!("{:>2}", civil.day),
        'j' => number(civil.year_day + 1, 3),
        'H' => number(hour, 2),
        'I' => number(hour12, 2),
        'M' => number(minute, 2),
        'S' => number(second, 2),
        'p' => if hour < 12 { "AM" } else { "PM" }.into(),
        'B' => month.into(),
        'b' | 'h' => month[..3].into(),
        'A' => day.into(),
        'a' => day[..3].into(),
        'w' => civil.week_day.to_string(),
        'F' => format!("{:04}-{:02}-{:02}", civil.year, civil.month, civil.day),
        'T' => format!("{hour:02}:{minute:02}:{second:02}"),
        'Z' => "UTC".into(),
        'z' => "+0000".into(),
        '%' => "%".into(),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_system_calendar() {
        // `date -u -d @N '+...'` of GNU coreutils.
        for (unix_s, format, expected) in [
            (0, "%Y-%m-%d %H:%M:%S %A %j %w", "1970-01-01 00:00:00 Thursday 001 4"),
            (951_782_399, "%F %T %a %b %-d", "2000-02-28 23:59:59 Mon Feb 28"),
            (951_782_400, "%d %B %Y, %I:%M %p", "29 February 2000, 12:00 AM"),
            (1_735_732_799, "%e %h %y%% %-H %Z%z", " 1 Jan 25% 11 UTC+0000"),
            (4_107_542_400, "%d %b %Y %j", "01 Mar 2100 060"),
            (-1, "%F %T", "1969-12-31 23:59:59"),
        ] {
            assert_eq!(strftime(format, unix_s).as_deref(), Ok(expected), "{unix_s}");
        }
        assert_eq!(strftime("%Q", 0), Err("%Q".into()));
        assert_eq!(strftime("100%", 0), Err("%".into()));
        assert!(strftime("%Y", i64::MAX).is_ok() && strftime("%Y", i64::MIN).is_ok());
    }
}
