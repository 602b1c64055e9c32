"""What looks at images: small classes, each with one method that takes their files.

    clip.py      ClipJudge: which class an image shows, zero-shot; ClipScore: how well it fits its prompt
    nudity.py    NudityJudge: exposed parts of the body, by NudeNet
    fid.py       Fid: the distance of two sets of images
    giphy.py     GiphyJudge: which celebrity the largest face is
    canvas.py    CanvasJudge: which of UnlearnCanvas' styles and objects
    demo.py      DemoJudge: which of the demo model's ten classes

Their modules import the packages that they need: import a module only where it is asked for.
"""
