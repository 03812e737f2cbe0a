"""Many processes train one student.

`place` reads a process's rank from its environment, `distributed` joins the job and its collectives, `watch` notices
ranks that die.
"""
