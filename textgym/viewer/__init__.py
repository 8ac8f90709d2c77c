from textgym.viewer.records import Record
