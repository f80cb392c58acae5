"""Settings of nbgrader for the course in this folder: type its commands here."""

c = get_config()  # noqa: F821 - nbgrader defines it

c.CourseDirectory.course_id = "npnet"
c.Execute.timeout = 120  # seconds a cell; as shipped none takes more than a few
c.GenerateAssignment.force = True  # release/ is in the repository, and the gradebook is not: make it again
