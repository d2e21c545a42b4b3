"""Numbers gone wrong, and data at the edge of what data can be: every case has one defined behaviour."""
