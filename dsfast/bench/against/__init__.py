"""`bench against`: the source tree as it stands beside a commit of it, in the same run.

`tree` makes the commit's sources runnable, `run` starts `side` in each of the two trees and has them take turns.
"""
