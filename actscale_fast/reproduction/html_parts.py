"""The style and the script of the HTML report."""

from typing import Final

STYLE: Final = """
:root{color-scheme:light}
body{margin:0;font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;color:#22252b;background:#fff}
nav{position:fixed;top:0;bottom:0;left:0;width:15rem;overflow:auto;background:#f6f7f9;border-right:1px solid #d5d8de}
nav ul{list-style:none;margin:0;padding:1rem}
nav li{margin:.2rem 0;line-height:1.3}
nav .l3{padding-left:1rem;font-size:.9em}
nav a{color:#22252b;text-decoration:none}
nav a:hover,nav a:focus{text-decoration:underline}
main{margin-left:15rem;padding:1rem 2rem 4rem;max-width:100rem}
h1{font-size:1.6rem}h2{margin-top:2.5rem;border-bottom:1px solid #d5d8de}h3{margin-top:1.8rem}
p{max-width:46rem}
code{background:#f0f1f4;border-radius:3px;padding:0 .25em;font-size:.92em}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.88em}
th,td{padding:.25rem .6rem;border-bottom:1px solid #e3e5ea;text-align:left;vertical-align:top}
th{vertical-align:bottom;background:#fff}
th button{all:unset;cursor:pointer;font-weight:600}
th button:focus-visible{outline:2px solid #0072b2}
th[aria-sort=ascending] button::after{content:" ▲"}
th[aria-sort=descending] button::after{content:" ▼"}
td:first-child{min-width:9rem}
td.n{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
td small{color:#5b616d}
.file,figcaption{color:#5b616d;font-size:.82em;margin:.2rem 0 1rem}
figure{margin:1rem 0;overflow-x:auto}
figure img{max-width:100%}
svg.map text{font-size:9px;fill:#5b616d}
svg.map rect:hover{stroke:#22252b;stroke-width:1.5}
#tip{position:fixed;pointer-events:none;background:#22252b;color:#fff;padding:.2rem .5rem;border-radius:4px;
font-size:.82em;z-index:9}
@media(max-width:60rem){nav{position:static;width:auto;border:0}main{margin:0;padding:1rem}}
"""

SCRIPT: Final = """
const tip=document.getElementById('tip');
document.addEventListener('mousemove',e=>{
 const t=e.target.dataset&&e.target.dataset.t;
 tip.hidden=!t;
 if(t){tip.textContent=t;
  tip.style.left=Math.min(e.clientX+12,innerWidth-tip.offsetWidth-4)+'px';
  tip.style.top=(e.clientY+16)+'px'}
});
for(const table of document.querySelectorAll('table.sortable')){
 const body=table.tBodies[0],heads=[...table.tHead.rows[0].cells];
 const value=(row,i)=>{const c=row.cells[i];return 'v' in c.dataset?+c.dataset.v:c.textContent};
 const rank=v=>v===''||Number.isNaN(v)?2:typeof v==='number'?0:1; // numbers, words, and last what is blank
 heads.forEach((head,i)=>head.firstChild.addEventListener('click',()=>{
  const up=head.getAttribute('aria-sort')!=='ascending';
  heads.forEach(h=>h.removeAttribute('aria-sort'));
  head.setAttribute('aria-sort',up?'ascending':'descending');
  const rows=[...body.rows].sort((a,b)=>{
   const x=value(a,i),y=value(b,i);
   if(rank(x)!==rank(y))return rank(x)-rank(y);
   const order=typeof x==='number'?x-y:x.localeCompare(y);
   return up?order:-order});
  body.append(...rows);
 }));
}
"""
