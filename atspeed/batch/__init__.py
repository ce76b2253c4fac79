"""Lists for many users: files of users in, files of lists out."""
