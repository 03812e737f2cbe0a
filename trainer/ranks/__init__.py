"""Many processes, one student: finding one's place (`place`), joining (`distributed`), noticing who is gone (`watch`)."""
